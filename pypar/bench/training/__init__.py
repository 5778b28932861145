"""Training speed of pypar's layouts beside plain PyTorch's: contenders, and the race that launches them in turn."""
