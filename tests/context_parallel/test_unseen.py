"""Context parallelism keeps what attention promises of keys that a query does not see."""

import math
from dataclasses import replace

import pytest
import torch

from pypar.ops.attention.arguments import attention_problem
from tests.context_parallel.cases import Case, inputs, many_ranks
from tests.ops.attention.unseen import REACHED, reach

CASES = {
    "causal": Case(T=310),
    "window": Case(T=310, window=(60, 0), sinks=True),
    "documents": Case(T=310, documents=(0, 20, 170, 171, 310)),
    "bias of keys": Case(T=310, bias="S"),
}
WAYS = [("ring", "zigzag"), ("ring", "striped"), ("all_gather", "zigzag"), ("ulysses", "zigzag")]


@pytest.mark.parametrize("what", REACHED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("method", "layout"), WAYS)
def test_what_is_not_seen_changes_nothing(method, layout, name, what):
    """Also not where what is summed over one rank's keys joins what is summed over another's."""
    case, at = CASES[name], (120, 200)
    given = inputs(case, torch.float32)
    if case.bias:
        given["bias"][150:] = -math.inf
    ends = None if case.documents is None else torch.tensor(case.documents, dtype=torch.int32)
    problem = attention_problem(
        *(given[x] for x in "qkv"), causal=True, window=case.window, cu_seqlens_q=ends, cu_seqlens_k=ends
    )
    if case.bias:
        problem = replace(problem, bias=given["bias"].expand(problem.scores_shape))
    rows, keys, _ = reach(problem, what, at)
    assert not rows.all()
    results = []
    for value in (0.0, math.nan):
        given[what][..., list(at), :, :] = value
        whole, _ = many_ranks(case, given, 2, layout, method=method, backend="native")
        batched = {
            x: whole[x] if ends is None else whole[x].unsqueeze(0) for x in ("out", "lse", "dq", "dk", "dv")
        }
        results.append({x: y if x == "lse" else y.transpose(1, 2) for x, y in batched.items()})
    expected, got = results
    for result, clean in (("out", ~rows), ("lse", ~rows), ("dq", ~rows), ("dk", ~keys), ("dv", ~keys)):
        assert torch.equal(got[result][clean], expected[result][clean]), result
    assert got["dq"][rows].isnan().any()
