"""Triton kernels without a GPU, of cases in which some bytes are moved more often than once, or never: products of
experts, choices that nobody takes, tokens that do not count."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from pypar.bench.gpu.triton_code import SHARED_BYTES, compile_launch, machine_code
from pypar.kernels.launch import launches_go_to
from pypar.selftest.cases import grouped_matmul
from pypar.selftest.row_kernels import launches_of
from tests.harness import row_kernels

PTXRUN = os.environ.get("PYPAR_PTXRUN")
CASES = [
    ("grouped_matmul", 0),
    ("moe_permute", 0),
    ("moe_permute", 1),
    ("cross_entropy", 0),
    pytest.param("cross_entropy", 1, marks=pytest.mark.slow),
    *(pytest.param("grouped_matmul", i, marks=pytest.mark.slow) for i in (1, 2)),
]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Any]:
    from tests.harness.triton_interpreter import Interpreter

    worker = Interpreter()
    try:
        yield worker
    finally:
        worker.close()


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_interpreted(interpreter, op, number, dtype):
    interpreter.call(row_kernels.check_kernel_case, op, number, dtype)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.slow) for c in (90, 100))])
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_products_spill_nothing(number, capability, tmp_path):
    case = grouped_matmul.compiled_cases()[number]
    for dtype in (torch.float32, torch.bfloat16):
        for launch in sum(launches_of(case, dtype), []):
            code = machine_code(compile_launch(launch, capability), tmp_path)
            fine = code.spills == 0 and code.stack_bytes == 0
            fine &= code.shared_bytes <= SHARED_BYTES[capability]
            assert fine, f"{launch.kernel.__name__} for {case.shape} {dtype} on {capability}: {code}"
            assert code.tensor_core or dtype == torch.float32, launch.kernel.__name__


@pytest.mark.skipif(not PTXRUN, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_ptx(monkeypatch, op, number, dtype):
    monkeypatch.syspath_prepend(PTXRUN)
    with launches_go_to(row_kernels.runner_of_ptx(80)):
        row_kernels.check_kernel_case(op, number, dtype)
