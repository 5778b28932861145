"""Times of every operator by the backend that a user gets, beside torch's: what `pypar bench all` says of operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from pypar.bench.figures import Figure
from pypar.ops.backend import op_modules
from pypar.selftest import judge
from pypar.selftest.case import Case
from pypar.selftest.rows import Limits, Options, cases_of, least_seconds, name_of, op_name, times

DTYPES = (torch.float32, torch.bfloat16)
_CALLS = ("forward", "forward and backward")


def figures(device: str, options: Options) -> Iterator[Figure]:
    """Those of the quick cases of each operator that the options name, after a check of the results.

    AssertionError where a result exceeds the rule of accuracy.
    """
    limits = Limits(options)
    for module in op_modules():
        if options.ops and op_name(module) not in options.ops:
            continue
        for case in cases_of(op_name(module), large=device == "cuda"):
            for dtype in DTYPES if case.quick else ():
                yield from _figures(op_name(module), case, device, dtype, limits)


def _figures(op: str, case: Case, device: str, dtype: torch.dtype, limits: Limits) -> Iterator[Figure]:
    expected = judge.expect_case(case, device, dtype)
    ours = functools.partial(case.ours, backend=None)
    judge.judge_draws([judge.results(ours, draw.inputs, draw.douts) for draw in expected], expected).check()
    seconds, peer = times(case, ours, expected[0], device, limits.options.budget_s)
    *least, limit = least_seconds(case, expected[0], device, limits)
    for i, call in enumerate(_CALLS[: len(seconds)]):
        yield Figure(
            bench=op,
            what=f"{case.shape}, {case.name}",
            dtype=name_of(dtype),
            call=call,
            seconds=seconds[i],
            peer=case.peer.name,
            peer_seconds=peer[i] if peer else None,
            limit=limit,
            share=least[i] / seconds[i],
        )
