"""Triton kernels of the operators whose file of cases has small_cases: run, counted, compiled, without a GPU.

Whatever runs a kernel, the operator is called as a user calls it, with its gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pypar.bench.gpu.moved import Moved, count
from pypar.kernels.launch import Launch, Table
from pypar.selftest.judge import check_case, draw_inputs, leaves, outputs, results
from pypar.selftest.row_kernels import cases_module, launches_of, operators

_BETWEEN = 0xA5  # a byte that belongs to no tensor


def small_cases() -> list[Any]:
    """(operator, number) of each of its small cases, for pytest to name."""
    return [(op, number) for op in operators() for number in range(len(cases_module(op).small_cases()))]


def check_small_case(op: str, number: int, dtype: torch.dtype) -> None:
    """AssertionError where results or gradients break the rule of accuracy; where kernels can run."""
    check_case(cases_module(op).small_cases()[number], dtype, "triton")


def check_kernel_case(op: str, number: int, dtype: torch.dtype) -> None:
    """The same of its kernel_cases, in which some bytes are moved more often than once, or never."""
    check_case(cases_module(op).kernel_cases()[number], dtype, "triton")


def check_any_strides(op: str) -> None:
    """AssertionError where inputs with gaps or expanded gradients give other values than dense ones.

    Bits may differ where a library multiplies, which goes by the strides.
    """
    module = cases_module(op)
    case = getattr(module, "small_cases" if hasattr(module, "small_cases") else "kernel_cases")()[0]
    ours = functools.partial(case.ours, backend="triton")
    dense = draw_inputs(case, torch.float32)
    with_gaps = {name: torch.stack((x.detach(), x.detach()), -1)[..., 0] for name, x in dense.items()}
    douts = [torch.full((), 0.5, dtype=x.dtype) for x in outputs(case.plain, dense)]
    shapes = [x.shape for x in outputs(case.plain, dense)]
    expanded = [x.expand(shape) for x, shape in zip(douts, shapes, strict=True)]
    expected = results(ours, dense, [x.clone(memory_format=torch.contiguous_format) for x in expanded])
    found = results(ours, leaves(with_gaps, case.gradients), expanded)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
        with tables_beside_their_tensors(launch) as mapped:
            kernel = TritonKernel(source_of(mapped), capability, **launch.options)
            arguments = {name: mapped.arguments[name] for name in kernel.arg_names}
            kernel.launch(launch.num_programs, arguments, race="raise", uninit="raise")

    return run


@contextlib.contextmanager
def tables_beside_their_tensors(launch: Launch) -> Iterator[Launch]:
    """The launch with each table and copies of its tensors in one tensor, as what runs PTX knows arguments alone.

    At the end the tensors have what was written; AssertionError where something was written between them.
    """
    tables = {name: x for name, x in launch.arguments.items() if isinstance(x, Table)}
    placed = {name: _in_one_piece(table) for name, table in tables.items()}
    yield replace(launch, arguments=launch.arguments | {name: whole for name, (whole, _) in placed.items()})
    for name, (whole, copies) in placed.items():
        for x, copy in zip(tables[name].tensors, copies, strict=True):
            x.copy_(copy)
            copy.view(torch.uint8).fill_(_BETWEEN)
        rest = whole.view(torch.uint8)[tables[name].written().nbytes :]
        assert bool((rest == _BETWEEN).all()), f"{launch.kernel.__name__} wrote beside its tensors"


def _in_one_piece(table: Table) -> tuple[Tensor, list[Tensor]]:
    """(one tensor that begins with the table, and within it copies of the tensors, which lie as far from 16 bytes)."""
    shape = table.written().shape
    ends = [8 * shape.numel()]
    begins = []
    for x in table.tensors:
        begins.append(-(-ends[-1] // 16) * 16 + 64 + x.data_ptr() % 16)
        ends.append(begins[-1] + x.nbytes)
    whole = torch.full((-(-ends[-1] // 8) + 8,), _BETWEEN, dtype=torch.uint8).repeat_interleave(8)
    copies = [
        whole[begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        for begin, x in zip(begins, table.tensors, strict=True)
    ]
    left = iter(copies)
    lists = tuple([next(left) for _ in column] for column in table.lists)
    replace(table, lists=lists).into(whole[: ends[0]].view(torch.int64).view(shape))
    return whole.view(torch.int64), copies
