"""Data parallelism: every rank has the whole model and a part of the batch; gradients are summed over
ranks."""

from pypar.data_parallel.buckets import GradientBuckets
from pypar.data_parallel.module import DataParallel

__all__ = ["DataParallel", "GradientBuckets"]
