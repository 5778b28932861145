"""Whether all ranks hold the same tensors."""

import pytest
import torch

from pypar.comm.identical import first_difference
from pypar.mesh import Axis, Mesh


def tensors():
    return [
        ("weight", torch.arange(6.0).view(2, 3).t()),
        ("scale", torch.ones(3, dtype=torch.bfloat16)),
        ("mask", torch.tensor([True, False])),
        ("empty", torch.empty(0)),
        ("wide", torch.ones((), dtype=torch.complex128)),
        ("abstract", torch.empty(5, device="meta")),
    ]


def run_difference(what):
    axis, named = Mesh(dp=2).data, tensors()
    if axis.rank == 1:
        if what == "value":
            named[1][1][2] = 1.0078125  # one bit
        elif what == "values":
            named[0][1][0, 0] = -0.0
            named[2][1][0] = False
        elif what == "shape":
            named[0] = ("weight", named[0][1].t())
        elif what == "name":
            named[1] = ("scales", named[1][1])
        elif what == "number":
            named.pop()
    before = axis.traffic.bytes_sent
    return first_difference(named, axis), axis.traffic.bytes_sent - before


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("nothing", None),
        ("value", "scale"),
        ("values", "weight and 1 more"),
        ("shape", "the list of names, shapes and dtypes"),
        ("name", "the list of names, shapes and dtypes"),
        ("number", "the list of names, shapes and dtypes"),
    ],
)
def test_what_differs_is_named_on_every_rank(ranks, what, found):
    for difference, num_bytes in ranks(2, run_difference, what):
        assert difference == found
        assert num_bytes <= 32 + 16 * len(tensors())


def test_one_rank_has_nothing_to_compare():
    assert first_difference(tensors(), Axis.single("data")) is None
