"""States of a model in chunks, which move between a device and its host by a plan (PatrickStar, arXiv 2108.05818)."""
