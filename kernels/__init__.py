"""Triton kernels, installed as `pypar.kernels`: one module an operator, importing torch and triton only.

Importing this package imports neither; a kernel's module is loaded by the op that uses it.
"""
