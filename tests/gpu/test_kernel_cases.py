"""Triton kernels without a GPU, of cases in which some bytes are moved more often than once, or never: products of
experts, choices that nobody takes, tokens that do not count."""

import os

import pytest
import torch

from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from pypar.bench.gpu.triton_code import SHARED_BYTES, compile_launch, machine_code
from pypar.kernels.launch import launches_go_to
from pypar.selftest.row_kernels import cases_module, launches_of, operators
from tests.harness import row_kernels

PTXRUN = os.environ.get("PYPAR_PTXRUN")
CASES = [
    ("grouped_matmul", 0),
    ("moe_permute", 0),
    ("moe_permute", 1),
    ("cross_entropy", 0),
    pytest.param("cross_entropy", 1, marks=pytest.mark.slow),
    ("linear_cross_entropy", 0),
    ("linear_cross_entropy", 1),
    *(pytest.param("linear_cross_entropy", i, marks=pytest.mark.slow) for i in (2, 3, 4)),
    *(pytest.param("grouped_matmul", i, marks=pytest.mark.slow) for i in (1, 2)),
]
WITH_GRADIENTS = [op for op in operators("compiled_cases") if op not in ("adamw", "bucket")]
COMPILED = [("grouped_matmul", 0), ("grouped_matmul", 1), *(("linear_cross_entropy", i) for i in range(3))]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_interpreted(interpreter, op, number, dtype):
    interpreter.call(row_kernels.check_kernel_case, op, number, dtype)


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_strides_change_no_value(interpreter, op):
    interpreter.call(row_kernels.check_any_strides, op)


@pytest.mark.parametrize(
    ("op", "number", "capability"),
    [
        pytest.param(op, number, capability, marks=pytest.mark.slow if number or capability != 80 else ())
        for op, number in COMPILED
        for capability in (80, 90, 100)
    ],
)
def test_compiled_code_spills_nothing(op, number, capability, tmp_path):
    case = cases_module(op).compiled_cases()[number]
    for dtype in (torch.float32, torch.bfloat16):
        for launch in sum(launches_of(case, dtype), []):
            code = machine_code(compile_launch(launch, capability), tmp_path)
            fine = code.spills == 0 and code.stack_bytes == 0
            fine &= code.shared_bytes <= SHARED_BYTES[capability]
            assert fine, f"{launch.kernel.__name__} for {case.shape} {dtype} on {capability}: {code}"
            multiplies_16_bits = op == "grouped_matmul" and dtype != torch.float32
            assert code.tensor_core or not multiplies_16_bits, launch.kernel.__name__


@pytest.mark.skipif(not PTXRUN, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_ptx(monkeypatch, op, number, dtype):
    monkeypatch.syspath_prepend(PTXRUN)
    with launches_go_to(row_kernels.runner_of_ptx(80)):
        row_kernels.check_kernel_case(op, number, dtype)
