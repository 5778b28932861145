"""Triton kernels of the operators whose file of cases has small_cases: run, counted, compiled, without a GPU.

Whatever runs a kernel, the operator is called as a user calls it, with its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pypar.bench.gpu.moved import Moved, count
from pypar.kernels.launch import Launch
from pypar.selftest.judge import check_case
from pypar.selftest.row_kernels import cases_module, launches_of, operators


def small_cases() -> list[Any]:
    """(operator, number) of each of its small cases, for pytest to name."""
    return [(op, number) for op in operators() for number in range(len(cases_module(op).small_cases()))]


def check_small_case(op: str, number: int, dtype: torch.dtype) -> None:
    """AssertionError where results or gradients break the rule of accuracy; where kernels can run."""
    check_case(cases_module(op).small_cases()[number], dtype, "triton")


def check_kernel_case(op: str, number: int, dtype: torch.dtype) -> None:
    """The same of its kernel_cases, in which some bytes are moved more often than once, or never."""
    check_case(cases_module(op).kernel_cases()[number], dtype, "triton")


def moved_by_small_case(op: str, number: int) -> list[list[Moved]]:
    """What forward and backward move, in fp32; only where Triton interprets kernels."""
    directions = launches_of(cases_module(op).small_cases()[number], torch.float32)
    return [count(launches) for launches in directions if launches]


@functools.cache
def runner_of_ptx(capability: int) -> Callable[[Launch], None]:
    """Compiles a launch for this capability and runs its PTX; needs ptxrun on the path."""
    from ptxrun.triton_aot import TritonKernel

    from pypar.bench.gpu.triton_code import source_of

    def run(launch: Launch) -> None:
        kernel = TritonKernel(source_of(launch), capability, **launch.options)
        arguments = {name: launch.arguments[name] for name in kernel.arg_names}
        kernel.launch(launch.num_programs, arguments, race="raise", uninit="raise")

    return run
