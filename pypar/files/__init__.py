"""Files that pypar reads and writes: JSON and tensors, none of which can run code, and where caches lie."""
