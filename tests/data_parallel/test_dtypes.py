"""Gradient buckets of mixed dtypes, and gradients kept in a wider dtype than their parameters."""

import torch
from torch import nn

from pypar.data_parallel import GradientBuckets
from pypar.mesh import Mesh


def run_dtypes(gradient_dtype):
    axis = Mesh(dp=2).data
    torch.manual_seed(0)
    low = nn.Parameter(torch.randn(33, 5).bfloat16())
    high = nn.Parameter(torch.randn(7))
    made = GradientBuckets([low, high], axis, bucket_bytes=1 << 20, gradient_dtype=gradient_dtype)
    factors = [1.0, 2.0**-9]  # their sum does not fit into bf16
    for _ in range(2):
        made.zero()
        with made.accumulate():
            (low.float() * factors[axis.rank]).sum().backward()
        (high.sum() + low.float().sum() * factors[axis.rank]).backward()
        made.finish()
    return made.gradient(low), made.gradient(high), low.grad is None, high.grad is None, made.num_buckets


def test_gradients_are_grouped_by_dtype(ranks):
    for low, high, low_hidden, high_hidden, num_buckets in ranks(2, run_dtypes, None):
        assert (low.dtype, high.dtype, num_buckets) == (torch.bfloat16, torch.float32, 2)
        assert not low_hidden and not high_hidden
        assert high.tolist() == [2.0] * 7


def test_gradients_of_bf16_parameters_add_up_in_fp32(ranks):
    for low, high, low_hidden, high_hidden, num_buckets in ranks(2, run_dtypes, torch.float32):
        assert (low.dtype, high.dtype, num_buckets) == (torch.float32, torch.float32, 1)
        assert low_hidden and not high_hidden
        assert torch.equal(low, torch.full((33, 5), 2 + 2.0**-8))
        assert high.tolist() == [2.0] * 7
