"""attention's Triton kernels, compiled to PTX and run in ptxrun on the CPU: the only place where their bfloat16 path
runs without a GPU."""

import os
import sys
from typing import Any

import pytest
import torch

if not os.environ.get("PYPAR_PTXRUN"):
    pytest.skip("PYPAR_PTXRUN does not name the folder that holds ptxrun", allow_module_level=True)
sys.path.insert(0, os.environ["PYPAR_PTXRUN"])

from ptxrun.triton_aot import TritonKernel

from pypar.bench.gpu.triton_code import source_of
from pypar.kernels.attention_launches import Device, Launch, backward_launches, forward_launches
from pypar.ops.attention.arguments import AttentionProblem
from pypar.ops.backend import Backend
from tests.gpu.attention.problems import draw
from tests.ops.attention.judge import compare

ARCHITECTURES = {80: "sm_80", 90: "sm_90"}


def run(launch: Launch, capability: int) -> None:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = TritonKernel(source_of(launch), capability, **options)
    arguments = {name: launch.arguments[name] for name in kernel.arg_names}
    kernel.launch(launch.num_programs, arguments, race="raise")


def backend_of(capability: int, splits: int | None = None) -> Backend:
    device = Device(ARCHITECTURES[capability], 1)

    def forward(problem: AttentionProblem, carry: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert carry is None
        out, lse = torch.empty(problem.out_shape, dtype=problem.q.dtype), torch.empty(problem.lse_shape)
        for launch in forward_launches(problem, device, out, lse, False, splits):
            run(launch, capability)
        return out, lse

    def backward(problem, dout, out, lse, dlse, into, dbias) -> tuple:  # noqa: PLR0913
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (problem.q, problem.k, problem.v))
        for launch in backward_launches(problem, device, dout, out, lse, dlse, gradients, False, dbias):
            run(launch, capability)
        return gradients

    return Backend("triton", forward, backward, lambda problem: None)


CASES = {
    "causal": {"causal": True, "T": 140, "S": 150},
    "window, alibi, sinks": {"window": (40, 8), "alibi": (2,), "sinks": True},
    "softcap, bias, dropout": {"softcap": 3.0, "bias": (2, 1, 90), "dropout_p": 0.17},
    "varlen, gqa": {"lengths": ([40, 0, 30], [50, 5, 70]), "N": 2, "G": 1, "causal": True},
    "value heads": {"Hv": 40},
    "many blocks": {"causal": True, "T": 300, "S": 310, "N": 1},
}
OPTIONS = {"T": 70, "S": 90, "B": 1}


@pytest.mark.parametrize(
    ("name", "dtype", "H", "capability"),
    [
        ("causal", torch.bfloat16, 64, 80),
        ("softcap, bias, dropout", torch.bfloat16, 64, 80),
        ("window, alibi, sinks", torch.float16, 128, 80),
        ("varlen, gqa", torch.bfloat16, 64, 90),
        ("many blocks", torch.bfloat16, 64, 90),  # tiles that are loaded while others are used
        *(
            pytest.param(name, dtype, H, capability, marks=pytest.mark.slow)
            for name in CASES
            for dtype in (torch.bfloat16, torch.float16)
            for H in (64, 128)
            for capability in ARCHITECTURES
        ),
    ],
)
def test_options(name, dtype, H, capability):
    compare(backend_of(capability), *draw(dtype=dtype, H=H, **{**OPTIONS, **CASES[name]}))


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_decoding(splits):
    """The backward of one query takes the same path as any other; here it is run too."""
    compare(backend_of(80, splits), *draw(T=1, S=300, N=4, G=1, H=64, B=1, dtype=torch.bfloat16))
