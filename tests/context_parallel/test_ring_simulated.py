"""Ring attention over simulated ranks: equal to one device for every mask, option, layout and degree.

The long tests have every mask and option in every layout at every degree, where the quick ones have each pair; how the
error grows in the other layouts, to which the quick tests of the error rule come at other degrees; and gradcheck with
every element's derivative, where the quick one looks at a random combination of them.
"""

import re
from dataclasses import replace

import pytest
import torch

from pypar.context_parallel import ring_attention
from pypar.context_parallel.auto import volume
from pypar.context_parallel.layouts import LAYOUTS, segments_of
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.ring import method as ring
from pypar.ops.attention.arguments import check_window
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import judge_result
from pypar.selftest.orders import InOrder
from tests.context_parallel.cases import CASES, Case, assert_close, inputs, many_ranks, one_device, options
from tests.harness.pairs import pairwise
from tests.harness.simulated_ranks import run_ranks

GROWTH_QUICK = (("reference", "contiguous"), ("native", "zigzag"))


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


@pytest.mark.parametrize(("name", "size", "layout"), pairwise(CASES, (1, 2, 3, 4, 8), sorted(LAYOUTS)))
def test_equals_one_device_and_sends_what_the_formula_says(name, size, layout):
    case = CASES[name]
    given = inputs(case, torch.float32)
    actual, sent = many_ranks(case, given, size, layout, backend="reference" if size == 3 else "native")
    assert_close(actual, one_device(case, given), 1e-5, 1e-4)
    formula = _volume(case, size, layout, torch.float32)
    check = volume.agreement_bytes(size)
    assert sent == [
        (forward + check, backward)
        for forward, backward in zip(formula.forward, formula.backward, strict=True)
    ]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_bytes_in_closed_form(layout):
    case, size = Case(T=48, causal=layout == "contiguous", H=8, Hv=12), 4
    block = 12 * 2 * (8 + 12) * 2  # bf16
    sums = 2 * block
    formula = _volume(case, size, layout, torch.bfloat16)
    if layout == "contiguous":  # and causal: rank r's keys go to the ranks behind it
        assert formula.forward == (block, 2 * block, 3 * block, 0)
        assert sum(formula.backward) == 6 * sums + 3 * block
    else:
        assert formula.forward == (3 * block,) * size
        assert formula.backward == (2 * block + 3 * sums,) * size


def _bf16(name, length=128):
    """The case, longer, so that rounding shows; inputs; what plain PyTorch makes in bf16; the exact results."""
    case = replace(CASES[name], N=4, G=2, H=16, Hv=16)
    if case.documents is None:
        case = replace(case, T=length)
    given = inputs(case, torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = {x: given[x].to(dtype).requires_grad_() for x in ("q", "k", "v", "sinks") if x in given}
        rest = {"alibi_slopes": given["alibi_slopes"].to(dtype)} if "alibi_slopes" in given else {}
        if case.documents is not None:
            rest |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(case.documents))
        keywords = options(case) | rest | {k: x for k, x in leaves.items() if k == "sinks"}
        keywords["dropout_seed"] = keywords["dropout_seed"] or 0
        with InOrder(0):
            out, _ = plain_attention(leaves["q"], leaves["k"], leaves["v"], **keywords)
            gradients = torch.autograd.grad(out, list(leaves.values()), given["dout"].to(dtype))
        named = zip(leaves, gradients, strict=True)
        results.append({"out": out.detach()} | {f"d{x}": gradient for x, gradient in named})
    given["dlse"].zero_()
    return case, given, *results


@pytest.mark.parametrize("name", ["causal", "full", "softcap", "sinks", "documents, everything"])
def test_bf16_error_is_at_most_twice_that_of_plain_bf16_attention(name):
    case, given, plain, exact = _bf16(name)
    for size, layout in ((2, "zigzag"), (3, "striped"), (8, "contiguous"), (16, "zigzag")):
        actual, _ = many_ranks(case, given, size, layout)
        for result in exact:
            judge_result(
                result, actual[result], [plain[result]], exact[result], gradient=result != "out"
            ).check()


@pytest.mark.parametrize(
    ("backend", "growth", "layout"),
    [
        pytest.param(
            backend,
            growth,
            layout,
            marks=() if (backend, layout) in GROWTH_QUICK else pytest.mark.slow,
        )
        for backend, growth in (("reference", 1.001), ("native", 1.1))
        for layout in sorted(LAYOUTS)
    ],
)
def test_bf16_error_does_not_grow_with_the_degree(backend, growth, layout):
    """The ring adds none: the reference's error is the same at every degree.

    The native op rounds probabilities to bf16, exactly only where a row's largest is first in its block; so from
    one block to several its error makes one step, measured as 7 % at most, and then stays. It is always below
    plain attention's on one device.
    """
    case, given, plain, exact = _bf16("causal", 512)

    def rms(results):
        return {x: (results[x] - exact[x]).square().mean().sqrt().item() for x in exact}

    sizes = (2, 4, 8, 16) if backend == "native" else (1, 4, 16)
    errors = {size: rms(many_ranks(case, given, size, layout, backend=backend)[0]) for size in sizes}
    for size in sizes[1:]:
        for result, error in errors[size].items():
            assert error <= growth * errors[sizes[0]][result], (size, result, errors)
            assert error <= rms(plain)[result]


class _Whole(torch.autograd.Function):
    """The whole sequence through a ring, for gradcheck: all ranks see the same perturbation."""

    @staticmethod
    def forward(ctx, case, layout, names, *leaves):
        given = dict(zip(names, (x.detach() for x in leaves), strict=True))
        shapes = inputs(case, torch.float64)
        rest = {name: shapes[name] for name in shapes if name not in given}
        actual, _ = many_ranks(case, given | rest, 2, layout, backward=False)
        ctx.case, ctx.layout, ctx.given = case, layout, given | rest
        return actual["out"], actual["lse"]

    @staticmethod
    def backward(ctx, dout, dlse):
        given = ctx.given | {"dout": dout, "dlse": dlse}
        actual, _ = many_ranks(ctx.case, given, 2, ctx.layout)
        gradients = [actual[f"d{name}"] for name in ctx.given if f"d{name}" in actual]
        return None, None, None, *gradients


SMALL = {
    "everything": Case(
        *(1, 4, 5, 2, 1, 2, 3),
        window=(3, 1),
        causal=False,
        softcap=3.0,
        sinks=True,
        alibi="N",
        bias="11TS",
        dropout_p=0.2,
    ),
    "documents": Case(*(1, 6, None, 2, 1, 2, 3), documents=(0, 2, 6), sinks=True),
}


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name,layout", [("everything", "zigzag"), ("documents", "striped")])
def test_gradcheck_through_two_ranks(name, layout, fast):
    case = SMALL[name]
    leaves = {x: t for x, t in inputs(case, torch.float64).items() if x in ("q", "k", "v", "sinks", "bias")}
    tensors = [x.requires_grad_() for x in leaves.values()]
    names = tuple(leaves)
    assert torch.autograd.gradcheck(lambda *x: _Whole.apply(case, layout, names, *x), tensors, fast_mode=fast)


def _twice(axis):
    given = inputs(Case(T=4), torch.float32, seed=axis.rank)
    q, k, v = given["q"], given["k"].requires_grad_(), given["v"]
    out = ring_attention(q, k, v, axis)
    (first,) = torch.autograd.grad(out, k, given["dout"], retain_graph=True)
    (second,) = torch.autograd.grad(out, k, given["dout"])
    assert torch.equal(first, second) and first.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(ring_attention(q, k, v, axis), out)


def test_backward_twice_with_a_gradient_of_keys_alone():
    run_ranks(4, _twice)


def _undecided(axis):
    q, k, v = (inputs(Case(T=4), torch.float32)[name] for name in ("q", "k", "v"))
    for _ in range(2):
        ring_attention(q, k, v, axis, dropout_p=0.5)


def test_the_first_rank_draws_the_seed_for_all(monkeypatch):
    seeds = {rank: [] for rank in range(3)}

    def add_forward(pieces, q, k, v, sums, call):
        if int(call.seed) not in seeds[call.axis.rank]:
            seeds[call.axis.rank].append(int(call.seed))

    monkeypatch.setattr(ring, "add_forward", add_forward)
    run_ranks(3, _undecided)
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == 2


# ---- refusals


def _call(axis, per_rank):
    """A call whose arguments some ranks have otherwise; what the rank sent."""
    given = inputs(Case(T=4), torch.float32)
    arguments = {name: given[name] for name in ("q", "k", "v")} | per_rank.get(axis.rank, {})
    try:
        ring_attention(*(arguments.pop(name) for name in ("q", "k", "v")), axis, **arguments)
    except ValueError as error:
        return str(error), dict(axis.traffic.calls)
    return None, None


LONGER = {name: x for name, x in inputs(Case(T=5), torch.float32).items() if name in ("q", "k", "v")}
DIFFERENT = {
    "length": (LONGER, r"length_q .* must be the same .* rank 0 has 12 and rank 1 has 15"),
    "window": ({"window": (3, 0)}, r"window with causal .* rank 0 has \(-1, 0\) and rank 1 has \(3, 0\)"),
    "softcap": ({"softcap": 2.0}, "softcap must .* rank 0 has 0.0 and rank 1 has 2.0"),
    "dtype": ({x: t.double() for x, t in LONGER.items()}, "length_q"),
    "layout": ({"layout": "striped"}, "layout must .* rank 0 has zigzag and rank 1 has striped"),
    "seed": ({"dropout_p": 0.5, "dropout_seed": 3}, "dropout_p must"),
    "sinks": ({"sinks": torch.zeros(4)}, r"sinks must .* rank 0 has None and rank 1 has \(4,\)"),
    "gradient": ({"q": torch.zeros(1, 4, 4, 8).requires_grad_()}, "whether a gradient is wanted must"),
    "refused": ({"softcap": -1.0}, r"softcap \(-1.0\) must be finite"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_raise_on_all_ranks_before_data_moves(name):
    different, message = DIFFERENT[name]
    for error, calls in run_ranks(3, _call, {1: different}):
        assert calls == {"all_gather": 2} and re.search(message, error), error


def _uneven(axis):
    x = torch.zeros(1, (3, 2)[axis.rank], 2, 8)
    with pytest.raises(ValueError, match=r"length_q .* rank 0 has 6 and rank 1 has 4"):
        ring_attention(x, x, x, axis)
    with pytest.raises(ValueError, match=rf"q has {x.shape[1]} positions on rank {axis.rank} .* is 4;"):
        ring_attention(x, x, x, axis, length_q=8, length_k=8)
    return ring_attention(x, x, x, axis, length_q=5, length_k=5).shape[1]


def test_unequal_parts_need_the_length():
    assert run_ranks(2, _uneven) == [3, 2]


REFUSED = {
    "unknown method 'rings', known are .*; did you mean 'ring'": {"method": "rings"},
    "'stripe' is not one of": {"layout": "stripe"},
    "method 'ring' has no option 'size'; it takes none": {"method_options": {"size": 2}},
    "with cu_seqlens; reshape it": {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)},
    r"bias \(3, 8\) must broadcast to \[B, N, T, S\] = \(1, 4, 4, 8\)": {"bias": torch.zeros(3, 8)},
    r"bias is torch.float64; it must be q's": {"bias": torch.zeros(8, dtype=torch.float64)},
    r"alibi_slopes \(3,\) must be": {"alibi_slopes": torch.zeros(3)},
    "cu_seqlens_k is there without": {"cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32)},
    r"dropout_p \(1.0\) must be": {"dropout_p": 1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    for error, _ in run_ranks(2, _call, dict.fromkeys(range(2), REFUSED[message])):
        assert re.search(message, error), error


@pytest.mark.parametrize(
    "cu_seqlens,message",
    [
        (torch.tensor([0, 8]), "must be int32"),
        (torch.tensor([1, 8], dtype=torch.int32), "must start at 0"),
        (torch.tensor([0, 5, 4, 8], dtype=torch.int32), "not decrease"),
        (torch.tensor([0, 9], dtype=torch.int32), "q has 4 positions on rank . .* sequence of 9"),
    ],
)
def test_documents_that_do_not_fit(cu_seqlens, message):
    packed = {x: t[0, :4] for x, t in LONGER.items()} | {"cu_seqlens": cu_seqlens}
    for error, _ in run_ranks(2, _call, dict.fromkeys(range(2), packed)):
        assert re.search(message, error), error
