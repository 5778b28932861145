"""How speed is measured: what `pypar bench` runs, and what the programs of bench/ have in common.

timing.py is also the clock of the self-test.
"""
