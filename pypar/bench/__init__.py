"""How speed is measured: the clock of every bench, and what `pypar bench` and the programs of bench/ run by it."""
