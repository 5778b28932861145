"""all-reduce's Triton kernels compiled for GPUs that are not there: no register spilled, 16 bytes an access, and flags
written with release and read with acquire at system scope."""

import re
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip(
        "Triton has wheels for Linux only", allow_module_level=True
    )  # elsewhere a missing one is an error

from pypar.bench.gpu.triton_code import compile_launch, machine_code
from pypar.kernels.allreduce_launches import (
    LARGEST_ROW_BYTES,
    Workspace,
    all_reduce_launch,
    residual_norm_launch,
)

KERNELS = ("one-shot", "two-shot", "residual norm")
CAPABILITIES = (80, 90, 100)


def launch_of(name: str, dtype: torch.dtype, ranks: int, D: int = 4096):
    meta = {"device": "meta"}
    addresses, error = (
        torch.empty(ranks, dtype=torch.int64, **meta),
        torch.empty(1, dtype=torch.int64, **meta),
    )
    workspace = Workspace(addresses, error, ranks - 1, 1 << 20)
    if name == "residual norm":
        x, residual, out, kept = (torch.empty(16, D, dtype=dtype, **meta) for _ in range(4))
        weight = torch.empty(D, dtype=dtype, **meta)
        return residual_norm_launch(workspace, x, residual, weight, 1e-5, out, kept)
    x, y = (torch.empty(1 << 16, dtype=dtype, **meta) for _ in range(2))
    return all_reduce_launch(workspace, x, y, name == "two-shot")


def check(name, dtype, ranks, capability, folder, D=4096) -> str | None:  # noqa: PLR0913
    """What is wrong, or None."""
    compiled = compile_launch(launch_of(name, dtype, ranks, D), capability)
    code, ptx = machine_code(compiled, folder), compiled.asm["ptx"]
    written = re.findall(r"atom\.(\S+)\.exch\.b32", ptx)
    read = re.findall(r"atom\.(\S+)\.cas\.b32", ptx)
    wide = len(re.findall(r"ld\.global\.v4\.b32", ptx))
    fine = code.spills == 0 and code.stack_bytes == 0 and wide >= ranks
    fine = fine and written and all(set(order.split(".")) >= {"sys", "release"} for order in written)
    fine = fine and read and all(set(order.split(".")) >= {"sys", "acquire"} for order in read)
    where = f"{name} {dtype} {ranks} ranks cc {capability}"
    return None if fine else f"{where}: {code}, {wide} wide loads, flags {set(written)} {set(read)}"


@pytest.mark.parametrize(
    ("name", "dtype", "ranks", "capability"),
    [
        ("one-shot", torch.bfloat16, 8, 90),
        ("two-shot", torch.bfloat16, 8, 80),
        ("two-shot", torch.float32, 2, 100),
        ("residual norm", torch.bfloat16, 8, 90),
    ],
)
def test_some_configurations(name, dtype, ranks, capability, tmp_path):
    assert check(name, dtype, ranks, capability, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration(name, capability, tmp_path):
    wrong = [
        check(name, dtype, ranks, capability, tmp_path)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for ranks in (2, 4, 6, 8)
    ]
    if name == "residual norm":
        wrong.append(check(name, torch.bfloat16, 8, capability, tmp_path, LARGEST_ROW_BYTES // 2))
    assert not any(wrong), "\n".join(filter(None, wrong))
