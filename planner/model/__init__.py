"""Model shapes: what a checkpoint is made of, as frozen values, and the catalogue of published ones."""
