"""Triton kernels of every operator on rows, by the small cases of pypar/selftest/cases: in Triton's interpreter, which
also counts what they move; compiled for GPUs that are not there; and as PTX, where alone bfloat16 is bfloat16.

A new operator needs no line here: its backend "triton" and its small_cases and compiled_cases are found.
"""

import os
from typing import Any

import pytest
import torch

from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from pypar.bench.gpu.triton_code import SHARED_BYTES, compile_launch, machine_code
from pypar.kernels.launch import launches_go_to
from tests.harness import row_kernels

CAPABILITIES = (80, 90, 100)
OPERATORS = row_kernels.operators()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PTXRUN = os.environ.get("PYPAR_PTXRUN")
needs_ptxrun = pytest.mark.skipif(
    not PTXRUN, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun"
)


def quick_first(values: list[Any]) -> list[Any]:
    """The first of them, and the others as long tests."""
    return [values[0], *(pytest.param(*_as_tuple(value), marks=pytest.mark.slow) for value in values[1:])]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", quick_first(DTYPES), ids=str)
@pytest.mark.parametrize(("op", "number"), row_kernels.small_cases())
def test_interpreted(interpreter, op, number, dtype):
    interpreter.call(row_kernels.check_small_case, op, number, dtype)


@pytest.mark.parametrize(("op", "number"), row_kernels.small_cases())
def test_each_byte_is_moved_once(interpreter, op, number):
    """Of the tensors as large as the largest: read or written once, whichever kernel of a direction does it.

    adamw reads and writes once what it updates.
    """
    most = 2 if op == "adamw" else 1
    for moved in interpreter.call(row_kernels.moved_by_small_case, op, number):
        largest = max(tensor.num_elements for tensor in moved)
        for tensor in moved:
            if tensor.num_elements == largest:
                times = tensor.most_loads + tensor.most_stores
                assert max(tensor.most_loads, tensor.most_stores) == 1 and times <= most, tensor
                assert tensor.num_moved == times * tensor.num_elements, tensor


def compile_cases() -> list[Any]:
    """(operator, number of the case, capability): one for each operator is quick."""
    found = []
    for op in OPERATORS:
        numbers = range(len(row_kernels.cases_module(op).compiled_cases()))
        found += quick_first([(op, number, capability) for number in numbers for capability in CAPABILITIES])
    return found


@pytest.mark.parametrize(("op", "number", "capability"), compile_cases())
def test_compiled_code_spills_nothing(op, number, capability, tmp_path):
    case = row_kernels.cases_module(op).compiled_cases()[number]
    for dtype in DTYPES[:2] if number else DTYPES[1:2]:
        forward, backward = row_kernels.launches_of(case, dtype)
        for launch in forward + backward:
            code = machine_code(compile_launch(launch, capability), tmp_path)
            fine = (
                code.spills == 0 and code.stack_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]
            )
            assert fine, f"{launch.kernel.__name__} for {case.shape} {dtype} on {capability}: {code}"


@needs_ptxrun
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("op", "number"),
    [pytest.param(op, i, marks=pytest.mark.slow if i else ()) for op, i in row_kernels.small_cases()],
)
def test_ptx(monkeypatch, op, number, dtype):
    monkeypatch.syspath_prepend(PTXRUN)
    with launches_go_to(row_kernels.runner_of_ptx(90 if number % 2 else 80)):
        row_kernels.check_small_case(op, number, dtype)
