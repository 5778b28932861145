"""The text of a run: where it comes from, its tokens and their cache, windows of them, the microbatches of a rank."""
