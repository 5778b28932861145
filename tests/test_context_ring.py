"""Ring attention over simulated ranks: equal to one device for every mask, option, layout and degree."""

import pytest
import torch
from context_cases import CASES, Case, assert_close, inputs, many_ranks, one_device

from pypar.context_parallel import volume
from pypar.context_parallel.layouts import LAYOUTS, segments_of
from pypar.context_parallel.masks import Mask
from pypar.ops.attention_arguments import check_window


def _mask(case):
    left, right = check_window(case.window, case.causal)
    queries = case.documents or (0, case.T)
    return Mask(left, right, queries, case.documents_k or (queries if case.S is None else (0, case.S)))


def _volume(case, size, layout, dtype):
    queries, keys = (
        tuple(segments_of(length, rank, size, layout) for rank in range(size))
        for length in (case.T, case.length_k)
    )
    sizes = volume.Sizes(case.B, case.N, case.G, case.H, case.Hv, dtype)
    return volume.ring(sizes, queries, keys, _mask(case))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device_and_sends_what_the_formula_says(name, layout):
    case = CASES[name]
    given = inputs(case, torch.float32)
    expected = one_device(case, given)
    for size in (1, 2, 3, 4, 8):
        formula = _volume(case, size, layout, torch.float32)
        check = volume.agreement_bytes(size)
        for backend in ("native", "reference"):
            actual, sent = many_ranks(case, given, size, layout, backend=backend)
            assert_close(actual, expected, 1e-5, 1e-4)
            assert sent == [
                (forward + check, backward)
                for forward, backward in zip(formula.forward, formula.backward, strict=True)
            ]
