"""Attention's CUDA backward as nvcc compiles it, run by ptxrun, which also looks for races and missing waits."""

import ctypes
import math
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention.arguments import AttentionProblem, attention_problem
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import expect
from tests.harness.pairs import pairwise
from tests.harness.ptx_attention import CProblem, CTensor, Launcher, c_problem, c_tensor

FOLDER = os.environ.get("PYPAR_PTXRUN", "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]
DTYPES = (torch.bfloat16, torch.float16)
QUERIES_PADDING = 64
PLACE_BYTES = 72


class CBackward(ctypes.Structure):
    """AttentionBackward in csrc/attention/arguments.h."""

    _fields_ = [
        ("problem", CProblem),
        *((name, CTensor) for name in ("dout", "out", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
        ("lse_rest", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("accumulate", ctypes.c_bool),
        ("dbias", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("left_out", ctypes.c_void_p),
    ]


class CArguments(ctypes.Structure):
    """BackwardArguments in csrc/attention/cuda/backward_kernel.cuh."""

    _fields_ = [
        ("call", CBackward),
        ("lse", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("padded_length", ctypes.c_int64),
        ("values_batch_stride", ctypes.c_int64),
        ("per_head", ctypes.c_int),
        ("group", ctypes.c_int),
        ("modified", ctypes.c_bool),
        ("inverse_softcap", ctypes.c_float),
        ("kept_factor", ctypes.c_float),
    ]


@dataclass
class Sizes:
    """BackwardSizes in csrc/attention/cuda/backward_products.cuh."""

    threads: int
    rows: int
    columns: int
    split: bool


SIZES = {
    (2, 64): Sizes(128, 128, 64, False),
    (2, 128): Sizes(256, 128, 32, False),
    (2, 256): Sizes(128, 64, 16, True),
    (4, 64): Sizes(128, 64, 32, False),
    (4, 128): Sizes(128, 64, 16, True),
    (4, 256): Sizes(64, 32, 8, True),
}


def run_backward(
    problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, **options
) -> tuple[list[Tensor], Tensor | None]:
    """([dq, dk, dv], dbias) of the compiled kernels, as csrc/attention/cuda/ launches them, without sequences."""
    (B, T, N, H), (_, S, G, Hv) = problem.q.shape, problem.v.shape
    padded = math.ceil(T / QUERIES_PADDING) * QUERIES_PADDING
    made = {name: torch.full_like(getattr(problem, name[1:]), torch.nan) for name in ("dq", "dk", "dv")}
    made |= {name: torch.full((B, N, padded), torch.nan) for name in ("base", "delta")}
    if problem.bias is not None:
        made["dbias"] = torch.zeros(problem.scores_shape)
    given = {name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}
    given |= {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
    launcher = Launcher("attention/cuda/backward.cu", FOLDER, made | given)

    arguments = CArguments(lse=made["base"].data_ptr(), delta=made["delta"].data_ptr(), padded_length=padded)
    call = arguments.call
    call.problem = c_problem(problem)
    for name in ("dout", "out", "dq", "dk", "dv"):
        setattr(call, name, c_tensor((made | given)[name]))
    call.lse, call.dlse = lse.data_ptr(), dlse.data_ptr()
    call.dbias = made["dbias"].data_ptr() if "dbias" in made else None
    arguments.values_batch_stride, arguments.group = N * padded, N // G
    arguments.inverse_softcap = 1 / problem.softcap if problem.softcap else 0.0
    arguments.kept_factor = 1 / (1 - problem.dropout_p)
    features = (
        problem.softcap,
        problem.dropout_p,
        problem.bias is not None,
        problem.alibi_slopes is not None,
    )
    arguments.modified = any(features)

    arguments.per_head = padded // QUERIES_PADDING
    lanes = 8 if Hv <= 64 else 16 if Hv <= 128 else 32
    fp32 = problem.q.dtype == torch.float32
    values = (arguments, lanes, 1.0 if fp32 else math.log2(math.e))
    launcher.launch("attention_backward_values", arguments.per_head * N * B, 256, values, **options)
    head = next(size for size in (64, 128, 256) if max(H, Hv) <= size)
    element = problem.q.element_size()
    sizes = SIZES[element, head]
    shared = head * element * (2 * sizes.rows + 4 * sizes.columns) + 16 * sizes.columns + PLACE_BYTES
    tags = {torch.bfloat16: "11BFloat16Tag", torch.float16: "10Float16Tag", torch.float32: "10Float32Tag"}
    for keys, length, heads in ((True, S, G), (False, T, N)):
        arguments.per_head = math.ceil(length / sizes.rows)
        blocks = arguments.per_head * heads * B * (2 if keys and sizes.split else 1)
        mark = f"{tags[problem.q.dtype]}ELi{head}ELb{keys:d}E"
        launcher.launch(mark, blocks, sizes.threads, (arguments,), shared, **options)
    return [made[name] for name in ("dq", "dk", "dv")], made.get("dbias")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def check(
    lengths: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, keywords: dict, **options
) -> None:
    """The gradients of the compiled kernels keep the error rule, given the reference's out and lse."""
    (T, S), (H, Hv) = lengths, sizes
    shapes = {"q": (1, T, 2, H), "k": (1, S, 1, H), "v": (1, S, 1, Hv)}
    tensors = {name: draw(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    keywords = dict(keywords)
    if "bias" in keywords:
        tensors["bias"] = keywords.pop("bias")
    problem = attention_problem(**tensors, **keywords)
    out, lse, _ = attention_reference.forward(problem, None)
    dout, dlse = draw(*out.shape, seed=5, dtype=dtype), draw(*lse.shape, seed=6)
    gradients, dbias = run_backward(problem, dout, out, lse, dlse, **options)
    named = dict(zip(("q", "k", "v"), gradients, strict=True))
    if dbias is not None:
        named["bias"] = dbias.sum_to_size(tensors["bias"].shape).to(tensors["bias"].dtype)
    for x in tensors.values():
        x.requires_grad_()
    expected = expect(lambda **x: plain_attention(**x, **keywords), tensors, [dout, dlse])
    for name, gradient in named.items():
        expected.check(f"d{name}", gradient)


@pytest.mark.parametrize(("H", "dtype", "T"), pairwise((64, 128, 256), DTYPES, (33, 63)))
def test_every_instance(H, dtype, T):
    """Neither blocks nor tiles are whole."""
    check((T, 70), (H, H), dtype, {"causal": True} if T == 63 else {})


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("T", [33, 63])
def test_every_instance_in_fp32(H, T):
    """The products are a hundred thousand multiply-adds, one by one: up to a minute for ptxrun."""
    check((T, 70), (H, H), torch.float32, {"causal": True} if T == 63 else {})


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_every_option(dtype):
    options = {"window": (40, 5), "softcap": 5.0, "dropout_p": 0.17, "dropout_seed": 3}
    slopes, bias = torch.tensor([0.1, 0.2]), draw(2, 33, 70, seed=7, dtype=dtype)
    check((33, 70), (40, 64), dtype, {**options, "alibi_slopes": slopes, "bias": bias})


@pytest.mark.parametrize(("schedule", "cp_async"), [("warp", "late"), ("block", "early")])
def test_any_order_of_warps_and_copies(schedule, cp_async):
    check((33, 70), (64, 64), torch.bfloat16, {}, schedule=schedule, cp_async=cp_async, block_order="random")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("H", [40, 64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [(63, 111), (111, 63), (200, 140)], ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (20, 30)}], ids=str)
def test_lengths(lengths, H, dtype, mask):
    check(lengths, (H, H), dtype, mask)
