"""What each operator is tried on: inputs of named shapes, the plain definition, and the fastest that torch has.

`<op>.py` holds those of the operator of that name, for the tests, `pypar selftest` and bench/ alike: `case(...)` makes
one Case of given sizes, `cases(large)` those of the self-test, of sizes for a GPU or for a CPU, and `plain` is the
definition in plain PyTorch, which computes in the dtype of its inputs, float64 too.
"""
