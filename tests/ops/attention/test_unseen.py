"""A key that a query does not see changes no bit of that query's results, whatever it and its value hold; nor does such
a query change the key's gradients. A query that sees a value that is not a number gets none.

What is poisoned is compared with the same call with zeros in the poison's place. The long tests poison each operand of
each way not to see a key in each type on each instruction set, the quick ones have every pair.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pypar.hugging_face.attention import attention_forward as interface_forward
from pypar.ops import native
from pypar.ops.attention import BACKENDS
from pypar.ops.attention.arguments import AttentionProblem, Positions
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import TRITON_MISSING
from pypar.ops.scaled_dot_product_attention import scaled_dot_product_attention
from tests.harness.native_kernels import instruction_set
from tests.harness.pairs import pairwise
from tests.harness.simt import build as simt_build
from tests.ops.attention.unseen import POISONS, REACHED, Way, draw, make, poisoned, reach

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOW = pytest.mark.slow

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


def check_way(way: Way, dtype: torch.dtype, what: str, backend: str | Backend) -> None:
    check(*make(way, dtype), what, way.keys if what in "kv" else way.rows, backend)


@pytest.mark.parametrize(
    ("isa", "dtype", "name", "what"), pairwise(native.module().supported_isas(), DTYPES, WAYS, REACHED)
)
def test_what_is_not_seen_changes_nothing(isa, dtype, name, what):
    check_way(WAYS[name], dtype, what, f"native {isa}")


@pytest.mark.parametrize("what", REACHED)
@pytest.mark.parametrize("name", [name for name in WAYS if "splits" not in name and "joined" not in name])
def test_in_the_reference(name, what):
    check_way(WAYS[name], torch.float32, what, "reference")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["causal", "window", "bias over pairs", "decoding", "decoding a window", "documents"]
)
def test_a_single_element_reaches_what_it_does_by_definition(name, value):
    """One column of a value is one column of out, and of dout one of dv. Which results are finite, both agree."""
    way = WAYS[name]
    problem, dout = make(way, torch.float32)
    for x, at in ((problem.v, way.keys[-1]), (dout, way.rows[-1]), (problem.v, 7)):
        x[..., at, 0, 3] = value
    if math.isnan(value):
        problem.k[..., 30, 0, 2] = problem.q[..., way.T // 2, 1, 1] = value
    expected, got = run(problem, dout, "reference"), run(problem, dout, "native")
    for result, theirs in expected.items():
        assert torch.equal(got[result].isfinite(), theirs.isfinite()), result


# What a GPU's kernels promise: other sequences.
GPU_WAY = Way(93, 93, (30,), (40,), {}, lengths=(20, 43, 30), N=1, H=32, Hv=40)


@pytest.fixture(scope="module")
def triton() -> Iterator[Backend]:
    from tests.harness.triton_interpreter import Interpreter

    worker = Interpreter()
    try:
        yield Backend("triton", worker.forward, worker.backward, never_refuses)
    finally:
        worker.close()


@pytest.mark.skipif(TRITON_MISSING is not None, reason=f"{TRITON_MISSING}")
@pytest.mark.parametrize("what", [x if x in ("v", "q") else pytest.param(x, marks=SLOW) for x in REACHED])
def test_other_sequences_by_triton(triton, what):
    """An operand of keys and one of queries: of each pair one is poisoned quickly."""
    check_way(GPU_WAY, torch.float16, what, triton)


@pytest.mark.skipif(simt_build.why_not() is not None, reason=f"{simt_build.why_not()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_sequences_by_cuda(dtype):
    from tests.gpu.attention.test_cuda_backward import backend

    for what in REACHED:
        check_way(GPU_WAY, dtype, what, backend("fast"))


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
