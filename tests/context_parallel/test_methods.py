"""Ulysses, all-gather and hybrid over simulated ranks: equal to one device; what they send; what they refuse.

The long tests have every mask and option in every layout at every degree, where the quick ones have each pair.
"""

import pytest
import torch

from pypar.context_parallel.auto import volume
from pypar.context_parallel.layouts import LAYOUTS, segments_of, unions
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.heads import head_share
from pypar.context_parallel.methods.hybrid import HybridGroups, default_size
from pypar.ops.attention.arguments import check_window
from tests.context_parallel.cases import (
    CASES,
    Case,
    assert_close,
    inputs,
    many_ranks,
    on_rank,
    one_device,
    together,
)
from tests.harness.pairs import pairwise
from tests.harness.simulated_ranks import axis_of, run_ranks

MANY_HEADS = {name: case for name, case in CASES.items() if name != "one head"}


def _arguments(case, size, layout, dtype=torch.float32):
    queries, keys = (
        tuple(segments_of(length, rank, size, layout) for rank in range(size))
        for length in (case.T, case.length_k)
    )
    ends = case.documents or (0, case.T)
    mask = Mask(
        *check_window(case.window, case.causal),
        ends,
        case.documents_k or (ends if case.S is None else (0, case.S)),
    )
    return volume.Sizes(case.B, case.N, case.G, case.H, case.Hv, dtype), queries, keys, mask


def _sent(formula, size):
    check = volume.agreement_bytes(size)
    return [(f + check, b) for f, b in zip(formula.forward, formula.backward, strict=True)]


def _split(axis, ulysses_size):
    first = axis.rank - axis.rank % ulysses_size
    inner = axis_of(axis, range(first, first + ulysses_size))
    return HybridGroups(inner, axis_of(axis, range(axis.rank % ulysses_size, axis.size, ulysses_size)))


def _hybrid_rank(axis, case, given, layout, ulysses_size):
    groups = _split(axis, ulysses_size)
    call = {"method": "hybrid", "method_options": {"groups": groups}, "backend": "native"}
    results, (forward, backward) = on_rank(axis, case, given, layout, call)
    for part in {groups.ulysses, groups.ring} - {axis}:  # the simulated axes count apart
        forward += part.traffic.bytes_sent
    return results, forward + backward


@pytest.mark.parametrize(
    ("name", "size", "layout", "method"),
    pairwise(MANY_HEADS, (1, 2, 3, 4), sorted(LAYOUTS), ("ulysses", "all_gather")),
)
def test_equals_one_device_and_sends_what_the_formula_says(name, size, layout, method):
    case = CASES[name]
    given = inputs(case, torch.float32)
    actual, sent = many_ranks(case, given, size, layout, method=method, backend="native")
    assert_close(actual, one_device(case, given), 1e-5, 1e-4)
    if size > 1 and (method == "all_gather" or not case.bias):
        formula = getattr(volume, method)(*_arguments(case, size, layout))
        assert sent == _sent(formula, size)


@pytest.mark.parametrize(
    ("name", "sizes", "layout"),
    pairwise(MANY_HEADS, ((4, 2), (6, 3), (8, 4), (4, 1), (4, 4)), ("contiguous", "zigzag")),
)
def test_hybrid_equals_one_device(name, sizes, layout):
    """sizes: of the whole group and of Ulysses' part."""
    case, (size, ulysses_size) = CASES[name], sizes
    given = inputs(case, torch.float32)
    outcome = run_ranks(size, _hybrid_rank, case, given, layout, ulysses_size)
    found = together(case, layout, [results for results, _ in outcome])
    assert_close(found, one_device(case, given), 1e-5, 1e-4)
    if not case.bias:
        formula = volume.hybrid(*_arguments(case, size, layout), ulysses_size)
        totals = [sum(both) for both in _sent(formula, size)]
        assert [sent for _, sent in outcome] == totals


_ENDS = (0, 3, 3, 214, 229, 1000, 1037, 1100)  # of documents, which ranks hold few rows of, too
_SHORT = (
    0,
    300,
    547,
    900,
    *range(905, 1101, 5),
)  # of 550 rows a rank has 3 of the third, of 367 one many of 5 rows
ONE_DEVICE = {
    "causal": Case(T=453, H=24),
    "full": Case(T=453, H=24, causal=False),
    "window": Case(T=2103, N=2, H=24, window=(100, 0)),
    "window of both sides": Case(T=900, H=24, window=(60, 33), causal=False),
    "grouped heads": Case(T=901, N=6, G=2, H=24, Hv=40),
    "alibi": Case(T=301, alibi="N"),
    "softcap, sinks, dropout": Case(T=301, softcap=2.0, sinks=True, dropout_p=0.3),
    "bias": Case(T=301, bias="BNTS"),
    "more keys": Case(T=200, S=1737, H=24),
    "few rows each": Case(T=37, S=301, H=24),
    "few rows each, bias": Case(T=37, S=301, bias="BNTS"),
    "few rows each, bias of keys": Case(T=37, S=301, bias="S"),
    "documents": Case(T=1100, H=24, documents=_ENDS),
    "documents, full": Case(T=1100, H=24, documents=_ENDS, causal=False),
    "documents, window": Case(T=1100, H=24, documents=_ENDS, window=(50, 0)),
    "short documents": Case(T=1100, H=24, documents=_SHORT, causal=False),
}


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "size"),
    pairwise(ONE_DEVICE, ("contiguous", "zigzag"), (torch.float32, torch.bfloat16), (2, 3)),
)
def test_all_gather_has_the_bits_of_one_device(name, layout, dtype, size):
    """Of any lengths; of dk and dv the order of the sum over ranks is another."""
    case = ONE_DEVICE[name]
    given = inputs(case, dtype)
    expected = one_device(case, given, "native")
    actual, _ = many_ranks(case, given, size, layout, method="all_gather", backend="native")
    for result in {"out", "lse", "dq", "dbias"} & set(expected) - ({"dbias"} if case.bias == "S" else set()):
        assert torch.equal(actual[result], expected[result]), result


def test_all_gather_of_several_heads_at_once():
    case = Case(N=6, G=3, T=21)
    given = inputs(case, torch.float32)
    expected = one_device(case, given)
    for at_once in (1, 2, 3, 9):
        options = {"heads_at_once": at_once}
        actual, _ = many_ranks(case, given, 2, "zigzag", method="all_gather", method_options=options)
        assert_close(actual, expected, 1e-5, 1e-4)


@pytest.mark.parametrize(
    ("N", "G", "size"), [(8, 2, 4), (8, 2, 3), (6, 6, 4), (7, 7, 7), (12, 3, 5), (5, 1, 2)]
)
def test_shares_of_heads_are_all_heads_once_with_the_key_heads_that_they_use(N, G, size):
    shares = [head_share(N, G, index, size) for index in range(size)]
    assert [h for s in shares for h in range(N)[s.queries]] == list(range(N))
    for share in shares:
        used = [head // (N // G) for head in range(N)[share.queries]]
        assert list(range(G)[share.groups]) == sorted(set(used))
        if share.expanded is None:
            assert used == sorted(list(range(G)[share.groups]) * (len(used) // len(set(used))))
        else:
            assert [range(G)[share.groups][i] for i in share.expanded] == used


def test_what_neighbours_hold_together():
    zigzag = tuple(segments_of(80, rank, 4, "zigzag") for rank in range(4))
    assert unions(zigzag, 2, "zigzag") == tuple(segments_of(80, rank, 2, "zigzag") for rank in range(2))
    assert [default_size(8, G) for G in (1, 2, 3, 8, 9)] == [1, 2, 2, 8, 8]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            {"method": "ulysses", "N": 1},
            "ulysses over 2 ranks needs at least as many query heads, but q has 1",
        ),
        (
            {"method": "ulysses", "method_options": {"size": 2}},
            "'ulysses' has no option 'size'; it takes none",
        ),
        ({"method": "all_gather", "method_options": {"heads_at_once": 0}}, r"heads_at_once \(0\) must be"),
        (
            {"method": "hybrid", "method_options": {"ulysses_size": 3}},
            r"ulysses_size \(3\) must divide .* \[1, 2\]",
        ),
        ({"method": "hybrid", "method_options": {"ulysses_size": "2"}}, r"ulysses_size \(2\) must divide"),
        ({"method": "alltoall"}, "alltoall"),
    ],
)
def test_refusals_are_sentences_on_every_rank(call, sentence):
    call = dict(call)
    N = call.pop("N", 4)
    case = Case(N=N, G=min(N, 2))
    outcome = run_ranks(2, on_rank, case, inputs(case, torch.float32), "zigzag", call, outcomes=True)
    for error in outcome:
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=sentence):
            raise error


def test_a_ring_of_neighbours_refuses_stripes():
    case = Case()

    def rank(axis):
        return _hybrid_rank(axis, case, inputs(case, torch.float32), "striped", 2)

    for error in run_ranks(4, rank, outcomes=True):
        assert isinstance(error, ValueError) and "needs a layout of chunks" in str(error)
