"""Everything that imports torch: the dry run, recorded GPU runs and calibration."""
