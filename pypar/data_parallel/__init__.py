"""Data parallelism: every rank has the whole model and a part of the batch; gradients are summed over
ranks."""

from pypar.data_parallel.buckets import GradientBuckets

__all__ = ["GradientBuckets"]
