"""What `pypar bench` measures: nothing here is needed to run anything else."""
