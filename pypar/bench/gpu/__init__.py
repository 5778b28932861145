"""What compiled GPU kernels promise, found out without a GPU."""
