"""What bench/context_parallel.py measures: steps of attention over ranks, as processes run them."""
