"""attention's Triton kernels compiled for GPUs that are not there: every shipped configuration uses the tensor cores,
spills no register and fits the shared memory. Counts belong to the Triton release that constraints.txt names."""

import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip(
        "Triton has wheels for Linux only", allow_module_level=True
    )  # elsewhere a missing one is an error

from pypar.bench.gpu.triton_code import NEWEST, SHARED_BYTES, compile_launch, machine_code
from pypar.kernels.attention_launches import Device, Launch, backward_launches, forward_launches
from pypar.ops.attention.arguments import AttentionProblem, attention_problem

ARCHITECTURES = {80: "sm_80", 86: "other", 90: "sm_90", 100: "sm_100", 120: "other"}
KERNELS = ("forward", "decode", "combine", "delta", "dkdv", "dq")
SIZES = (64, 128, 256)
NO_PRODUCTS = ("combine", "delta")
# Tiles too small for wgmma or tcgen05 take HMMA: 16 rows in decoding, and 32 by 32 where two accumulators of head size
# 256 leave no room for more.
BY_HMMA = {(90, "decode", H) for H in SIZES} | {(100, "decode", H) for H in SIZES} | {(100, "dkdv", 256)}


def describe(H: int, dtype: torch.dtype, T: int = 4096, **options) -> AttentionProblem:
    shapes = {"q": (2, T, 8, H), "k": (2, 4096, 2, H), "v": (2, 4096, 2, H)}
    tensors = {n: torch.empty(shape, dtype=dtype, device="meta") for n, shape in shapes.items()}
    return attention_problem(**tensors, **options)


def launches(problem: AttentionProblem, arch: str) -> dict[str, Launch]:
    """By name, as on a device of this architecture; nothing is computed."""
    device = Device(arch, 132)
    out = torch.empty(problem.out_shape, dtype=problem.q.dtype, device="meta")
    lse = torch.empty(problem.lse_shape, device="meta")
    gradients = tuple(torch.empty_like(x) for x in (problem.q, problem.k, problem.v))
    names = ("forward", "combine") if problem.q.shape[1] > 1 else ("decode", "combine")
    found = dict(zip(names, forward_launches(problem, device, out, lse, False), strict=False))
    backward = backward_launches(problem, device, out, out, lse, None, gradients, False, None)
    return found | dict(zip(("delta", "dkdv", "dq"), backward, strict=True))


def check(name: str, H: int, capability: int, folder: Path, dtype=torch.bfloat16, **options) -> str | None:
    """What is wrong, or None."""
    problem = describe(H, dtype, 1 if name in ("decode", "combine") else 4096, **options)
    launch = launches(problem, ARCHITECTURES[capability])[name]
    code = machine_code(compile_launch(launch, capability), folder)
    fine = code.spills == 0 and code.stack_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]
    if name not in NO_PRODUCTS and dtype != torch.float32:
        wanted = "HMMA" if (capability, name, H) in BY_HMMA else NEWEST[capability]
        fine = fine and code.names == {wanted}
    return None if fine else f"{name} H{H} {dtype} cc {capability} {options}: {code}"


@pytest.mark.parametrize(
    ("name", "H", "capability"),
    [
        ("forward", 64, 80),
        ("forward", 128, 90),
        ("decode", 128, 90),
        ("combine", 128, 90),
        ("delta", 128, 90),
        ("dkdv", 128, 80),
        ("dkdv", 128, 90),
        ("dq", 64, 100),
    ],
)
def test_some_configurations(name, H, capability, tmp_path):
    assert check(name, H, capability, tmp_path, causal=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration(name, capability, tmp_path):
    wrong = [
        check(name, H, capability, tmp_path, dtype, **options)
        for H in SIZES
        for dtype in (torch.bfloat16, torch.float16)
        for options in ({}, {"causal": True})
    ]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "decode", "dkdv", "dq"])
def test_fp32(name, tmp_path):
    """dkdv of head size 256 spills whatever its tile is: 16 by 16 is the smallest."""
    sizes = (64, 128) if name == "dkdv" else SIZES
    wrong = [check(name, H, 80, tmp_path, torch.float32, causal=True) for H in sizes]
    assert not any(wrong), "\n".join(filter(None, wrong))
