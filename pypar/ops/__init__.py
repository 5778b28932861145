"""The operators of a transformer: one file each, with its contract, its definition in plain PyTorch and its backends."""
