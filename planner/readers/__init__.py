"""The edges inwards: config.json, checkpoints, profiles and logs of other tools, read into values."""
