"""The training job: configuration, data, checkpoints, checks before the start, and the run itself."""
