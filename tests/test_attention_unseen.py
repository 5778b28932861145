"""A key that a query does not see changes no bit of that query's results, whatever it and its value hold; nor does such
a query change the key's gradients. A query that sees a value that is not a number gets none.

What is poisoned is compared with the same call with zeros in the poison's place.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import simt_build
import torch
from accuracy import instruction_set
from context_cases import Case, inputs, many_ranks
from torch import Tensor

from pypar.models.attention_interface import attention_forward as interface_forward
from pypar.ops import attention_triton, native
from pypar.ops.attention import BACKENDS
from pypar.ops.attention_arguments import AttentionProblem, Positions, attention_problem
from pypar.ops.attention_reference import sequences
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.rows import accumulate_dtype
from pypar.ops.scaled_dot_product_attention import scaled_dot_product_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS_HERE = [f"native {isa}" for isa in native.module().supported_isas()] + ["reference"]
POISONS = [math.nan, math.inf]
# Of each operand, the results of those who see a NaN in it that are NaN then.
REACHED = {
    "k": ("out", "lse", "dq", "dk", "dv"),
    "v": ("out", "dq", "dk"),
    "q": ("out", "lse", "dq", "dk", "dv"),
    "dout": ("dq", "dk", "dv"),
}


@dataclass(frozen=True)
class Way:
    """Not to see a key: lengths, options of attention_problem, and the keys (of S) and queries (of T) to poison."""

    T: int
    S: int
    keys: tuple[int, ...]
    rows: tuple[int, ...]
    options: dict
    lengths: tuple[int, ...] | None = None  # of documents, of queries and of keys
    hidden: str | None = None  # what a bias hides
    B: int = 1
    N: int = 2
    G: int = 1
    H: int = 24
    Hv: int = 20


WAYS = {
    "causal": Way(230, 230, (140, 229), (0, 100), {"causal": True}, B=2),
    "causal, more keys": Way(110, 300, (250,), (50,), {"causal": True}),
    "window": Way(250, 250, (0, 120, 200), (40, 249), {"window": (30, 9)}, N=4, G=2, H=40),
    "window of one side": Way(200, 200, (5, 100), (120,), {"window": (40, None)}),
    "documents": Way(260, 260, (60, 150), (3, 250), {"causal": True}, lengths=(70, 0, 103, 87)),
    "documents, all of each": Way(260, 260, (150,), (200,), {}, lengths=(70, 0, 103, 87)),
    "keys that no query sees": Way(120, 200, (130, 199), (7,), {"window": (3, 3), "positions": Positions()}),
    "bias over keys": Way(130, 220, (100, 219), (9,), {}, hidden="keys"),
    "bias over pairs": Way(130, 220, (64, 130), (9,), {"causal": True}, hidden="pairs", B=2),
    "everything": Way(
        150,
        190,
        (64, 189),
        (9,),
        {"causal": True, "softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 3, "sinks": True, "alibi": True},
        hidden="pairs",
    ),
    "stripes": Way(100, 160, (90, 159), (30,), {"causal": True, "positions": Positions(40, 1, 3)}),
    "decoding": Way(4, 450, (448, 449), (1,), {"causal": True}, N=4, G=2),
    "decoding a window": Way(8, 600, (250, 394, 597), (3,), {"window": (200, 0)}, H=40),
    "decoding with a bias": Way(2, 420, (300, 419), (1,), {}, hidden="keys", H=72),
    "decoding with a bias over pairs": Way(3, 400, (399,), (1,), {}, hidden="pairs"),
    "decoding documents": Way(6, 500, (100, 240), (1, 4), {"causal": True}, lengths=(3, 3)),
    "splits of the keys": Way(60, 3300, (1000, 3270), (30,), {"window": (2000, 0)}),
    "many rows, joined": Way(800, 1900, (1700,), (300,), {"causal": True}, N=1),
}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(way: Way, dtype: torch.dtype) -> tuple[AttentionProblem, Tensor]:
    """(problem, dout)."""
    batch = () if way.lengths else (way.B,)
    shapes = {"q": (way.T, way.N, way.H), "k": (way.S, way.G, way.H), "v": (way.S, way.G, way.Hv)}
    tensors = {
        name: draw(*batch, *shape, seed=seed, dtype=dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    options, wide = dict(way.options), accumulate_dtype(tensors["q"])
    if options.pop("sinks", False):
        options["sinks"] = draw(way.N, seed=5, dtype=wide)
    if options.pop("alibi", False):
        options["alibi_slopes"] = draw(way.N, seed=6, dtype=wide).abs() / 20
    if way.lengths:
        ends = torch.tensor((0, *way.lengths)).cumsum(0)
        for name, total in (("cu_seqlens_q", way.T), ("cu_seqlens_k", way.S)):
            options[name] = (ends * total // ends[-1]).int()
    if way.hidden == "keys":
        options["bias"] = draw(1, 1, 1, way.S, seed=7, dtype=dtype)
        options["bias"][..., [*range(10, 20), *way.keys]] = -math.inf
    if way.hidden == "pairs":
        options["bias"] = draw(way.B, way.N, way.T, way.S, seed=7, dtype=dtype)
        options["bias"][draw(*options["bias"].shape, seed=8, dtype=torch.float32) > 0] = -math.inf
    return attention_problem(**tensors, **options), draw(*batch, way.T, way.N, way.Hv, seed=4, dtype=dtype)


def seen_pairs(problem: AttentionProblem) -> Tensor:
    """[B, N, T, S]; of sequences one after the other B is 1."""
    T, S = problem.q.shape[-3], problem.k.shape[-3]
    seen = torch.zeros(
        1 if problem.varlen else problem.q.shape[0], problem.q.shape[-2], T, S, dtype=torch.bool
    )
    for part, rows, keys in sequences(problem):
        at = part.positions
        distance = at.q_start + at.step * torch.arange(rows.stop - rows.start)[:, None]
        distance = distance - (at.k_start + at.step * torch.arange(keys.stop - keys.start))
        near = torch.ones_like(distance, dtype=torch.bool)
        if problem.left >= 0:
            near &= distance <= problem.left
        if problem.right >= 0:
            near &= -distance <= problem.right
        seen[:, :, rows, keys] = near
    return seen if problem.bias is None else seen & (problem.bias != -math.inf)


def run(problem: AttentionProblem, dout: Tensor, backend: str | Backend) -> dict[str, Tensor]:
    """Results as [B, heads, positions, ...]."""
    isa: list[str] = []
    if isinstance(backend, str):
        name, *isa = backend.split()
        backend = next(x for x in BACKENDS if x.name == name)
    dbias = None
    with instruction_set(isa[0]) if isa else nullcontext():
        out, lse, *rest = backend.forward(problem, None)
        if problem.bias is not None:
            dbias = torch.zeros(problem.scores_shape, dtype=lse.dtype)
        gradients = backend.backward(problem, dout, out, lse, None, None, dbias, *rest)
    vectors = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    results = {name: (x.unsqueeze(0) if problem.varlen else x).transpose(1, 2) for name, x in vectors.items()}
    results["lse"] = lse.unsqueeze(0) if problem.varlen else lse
    return results if dbias is None else results | {"dbias": dbias}


def poisoned(
    problem: AttentionProblem, dout: Tensor, what: str, at: tuple[int, ...], value: float
) -> tuple[AttentionProblem, Tensor]:
    x = (dout if what == "dout" else getattr(problem, what)).clone()
    x[..., list(at), :, :] = value
    return (problem, x) if what == "dout" else (replace(problem, **{what: x}), dout)


def reach(problem: AttentionProblem, what: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, N, T] and keys [B, G, S] whose results the poison reaches, and the pairs that see each other."""
    seen = seen_pairs(problem)
    if what in "kv":
        rows = seen[..., list(at)].any(-1)
    else:
        rows = torch.zeros(seen.shape[:-1], dtype=torch.bool)
        rows[..., list(at)] = True
    keys = (seen & rows.unsqueeze(-1)).any(-2)
    return rows, keys.unflatten(1, (problem.k.shape[-2], -1)).any(2), seen


def check(
    problem: AttentionProblem, dout: Tensor, what: str, at: tuple[int, ...], backend: str | Backend
) -> None:
    rows, keys, seen = reach(problem, what, at)
    assert not rows.all(), "the poison reaches every row"
    expected = run(*poisoned(problem, dout, what, at, 0.0), backend)
    for value in POISONS:
        got = run(*poisoned(problem, dout, what, at, value), backend)
        for name, clean in (("out", ~rows), ("lse", ~rows), ("dq", ~rows), ("dk", ~keys), ("dv", ~keys)):
            assert torch.equal(got[name][clean], expected[name][clean]), (name, value)
        if problem.bias is not None:
            assert torch.equal(got["dbias"][~rows], expected["dbias"][~rows]), value
            assert (got["dbias"][~seen] == 0).all(), value
        if not math.isnan(value):
            continue
        rows_that_see = rows & seen.any(-1)
        for name in REACHED[what]:
            reached = got[name][keys if name in ("dk", "dv") else rows_that_see]
            assert reached.isnan().all(), f"{name} does not show the NaN in {what}"


@pytest.mark.parametrize("what", REACHED)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_what_is_not_seen_changes_nothing(backend, dtype, name, what):
    way = WAYS[name]
    check(*make(way, dtype), what, way.keys if what in "kv" else way.rows, backend)


# What a GPU's kernels promise: other sequences.
GPU_WAY = Way(150, 150, (60,), (90,), {}, lengths=(20, 57, 43, 30), H=32, Hv=40)


@pytest.mark.skipif(attention_triton.TRITON_MISSING is not None, reason=f"{attention_triton.TRITON_MISSING}")
def test_other_sequences_by_triton():
    from triton_interpreter import Interpreter

    worker = Interpreter()
    try:
        backend = Backend("triton", worker.forward, worker.backward, never_refuses)
        for what in REACHED:
            check(
                *make(GPU_WAY, torch.float16), what, GPU_WAY.keys if what in "kv" else GPU_WAY.rows, backend
            )
    finally:
        worker.close()


@pytest.mark.skipif(simt_build.why_not() is not None, reason=f"{simt_build.why_not()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_sequences_by_cuda(dtype):
    from test_attention_cuda_backward import backend

    for what in REACHED:
        check(*make(GPU_WAY, dtype), what, GPU_WAY.keys if what in "kv" else GPU_WAY.rows, backend("fast"))


# ---- over ranks: sums over blocks of keys are combined

CONTEXT = {
    "causal": Case(T=310),
    "window": Case(T=310, window=(60, 0), G=4),
    "documents": Case(T=310, documents=(0, 20, 170, 171, 310)),
    "bias of keys": Case(T=310, bias="S"),
    "sinks": Case(T=310, sinks=True),
}


@pytest.mark.parametrize("what", REACHED)
@pytest.mark.parametrize("name", CONTEXT)
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_over_ranks(method, layout, name, what):
    case, at = CONTEXT[name], [120, 200]
    given = inputs(case, torch.float32)
    if case.bias:
        given["bias"][150:] = -math.inf
    ends = None if case.documents is None else torch.tensor(case.documents, dtype=torch.int32)
    problem = attention_problem(
        given["q"],
        given["k"],
        given["v"],
        causal=True,
        window=case.window,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
    )
    if case.bias:
        problem = replace(problem, bias=given["bias"].expand(problem.scores_shape))
    rows, keys, _ = reach(problem, what, tuple(at))
    assert not rows.all()
    results = []
    for value in (0.0, *POISONS):
        given[what][..., at, :, :] = value
        many, _ = many_ranks(case, given, 2, layout, method=method, backend="native")
        whole = {
            x: many[x].unsqueeze(0) if ends is not None else many[x] for x in ("out", "lse", "dq", "dk", "dv")
        }
        results.append({x: y if x == "lse" else y.transpose(1, 2) for x, y in whole.items()})
    for got in results[1:]:
        for result, clean in (("out", ~rows), ("lse", ~rows), ("dq", ~rows), ("dk", ~keys), ("dv", ~keys)):
            assert torch.equal(got[result][clean], results[0][result][clean]), result


# ---- under torch's signature, and transformers'


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_torchs_function(kind, backend):
    """Batches padded to one length, as users have them: the padding holds anything."""
    q, k, v = (draw(2, 3, 150, 16, seed=i, dtype=torch.float32) for i in range(3))
    seen = (
        torch.ones(150, 150, dtype=torch.bool).tril()
        & (torch.arange(150) < torch.tensor([[90], [150]]))[:, None, None]
    )
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    results = []
    for value in (0.0, *POISONS):
        for x in (k, v):
            x[0, :, 90:] = value
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, attn_mask=mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for got in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_transformers(dtype):
    """Its masks of numbers hide with the smallest number instead of -inf."""
    q, k, v = (draw(2, 3, 150, 16, seed=i, dtype=torch.float32) for i in range(3))
    seen = (torch.arange(150) < torch.tensor([[90], [150]]))[:, None, None].expand(2, 1, 150, 150)
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    results = []
    for value in (0.0, *POISONS):
        k[0, :, 90:], v[0, :, 90:] = value, value
        results.append(interface_forward(torch.nn.Module(), q, k, v, mask)[0])
    assert all(torch.equal(got, results[0]) for got in results[1:])
