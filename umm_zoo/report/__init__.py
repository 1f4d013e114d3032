"""Pages about runs and comparisons: one file each, that opens from the disk and needs nothing else."""
