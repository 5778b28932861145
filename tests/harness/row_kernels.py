"""Triton kernels of the operators whose file of cases has small_cases: run, counted, compiled, without a GPU.

Whatever runs a kernel, the operator is called as a user calls it, with its gradients.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pypar.kernels.launch import Launch, launches_go_to
from pypar.ops.backend import op_modules
from pypar.selftest.case import Case
from pypar.selftest.judge import check_case, draw_inputs


def cases_module(op: str) -> ModuleType:
    return importlib.import_module(f"pypar.selftest.cases.{op}")


def operators() -> list[str]:
    """Those with a Triton backend; attention, whose kernels are no row's, has tests of its own."""
    names = [m.__name__.rsplit(".", 1)[1] for m in op_modules() if "triton" in {b.name for b in m.BACKENDS}]
    return [name for name in names if hasattr(cases_module(name), "small_cases")]


def small_cases() -> list[Any]:
    """(operator, number) of each of its small cases, for pytest to name."""
    return [(op, number) for op in operators() for number in range(len(cases_module(op).small_cases()))]


def check_small_case(op: str, number: int, dtype: torch.dtype) -> None:
    """AssertionError where results or gradients break the rule of accuracy; where kernels can run."""
    check_case(cases_module(op).small_cases()[number], dtype, "triton")


def launches_of(case: Case, dtype: torch.dtype) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and of backward. None is run."""
    found: list[Launch] = []
    with launches_go_to(found.append):
        inputs = draw_inputs(case, dtype)
        out = case.ours(**inputs, backend="triton")
        outs = out if isinstance(out, tuple) else (out,)
        forward = len(found)
        wanted = [inputs[name] for name in case.gradients]
        torch.autograd.grad(outs, wanted, [torch.ones_like(x) for x in outs])
    return found[:forward], found[forward:]


@dataclass(frozen=True)
class Moved:
    """How often the elements of a tensor were loaded and stored, the most often counted of them."""

    name: str
    num_elements: int
    element_bytes: int
    most_loads: int
    most_stores: int
    num_moved: int  # loads and stores of all its elements


def moved_by_small_case(op: str, number: int) -> list[list[Moved]]:
    """What forward and backward move, in fp32; only where Triton interprets kernels."""
    directions = launches_of(cases_module(op).small_cases()[number], torch.float32)
    return [count(launches) for launches in directions]


def count(launches: list[Launch]) -> list[Moved]:
    """Runs launches in Triton's interpreter; one entry for each tensor among their arguments."""
    from triton.runtime.interpreter import interpreter_builder as builder

    tensors: dict[int, tuple[str, Tensor]] = {}
    for launch in launches:
        for name, x in launch.arguments.items():
            if isinstance(x, Tensor) and x.numel():
                tensors.setdefault(x.data_ptr(), (name, x))
    addresses: dict[str, list[np.ndarray]] = {"loads": [], "stores": []}
    originals = builder.create_masked_load, builder.create_masked_store

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses["loads"].append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
        return originals[0](pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses["stores"].append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
        return originals[1](pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        for launch in launches:
            launch.run()
    finally:
        del builder.create_masked_load, builder.create_masked_store
    touched = {kind: np.concatenate([*found, np.zeros(0, np.uint64)]) for kind, found in addresses.items()}
    all_elements = {name: _addresses(x) for name, x in tensors.values()}
    return [_moved(name, x, all_elements, touched) for name, x in tensors.values()]


def _addresses(x: Tensor) -> np.ndarray:
    """Of each of its elements."""
    grids = np.meshgrid(*(np.arange(size) for size in x.shape), indexing="ij", sparse=True)
    offsets = sum(grid * stride for grid, stride in zip(grids, x.stride(), strict=True))
    return (x.data_ptr() + np.asarray(offsets) * x.element_size()).astype(np.uint64).ravel()


def _moved(name: str, x: Tensor, elements: dict[str, np.ndarray], touched: dict[str, np.ndarray]) -> Moved:
    """What lies between its elements counts too, unless it belongs to another tensor."""
    own = elements[name]
    others = np.concatenate([found for key, found in elements.items() if key != name] + [own[:0]])
    begin, end = own.min(), own.max() + np.uint64(x.element_size())

    def counts(found: np.ndarray) -> np.ndarray:
        found = found[(found >= begin) & (found < end) & ~np.isin(found, np.setdiff1d(others, own))]
        return np.bincount((found - begin).astype(np.int64) // x.element_size(), minlength=1)

    loads, stores = counts(touched["loads"]), counts(touched["stores"])
    return Moved(
        name,
        x.numel(),
        x.element_size(),
        int(loads.max()),
        int(stores.max()),
        int(loads.sum() + stores.sum()),
    )


@functools.cache
def runner_of_ptx(capability: int) -> Callable[[Launch], None]:
    """Compiles a launch for this capability and runs its PTX; needs ptxrun on the path."""
    from ptxrun.triton_aot import TritonKernel

    from tests.harness.triton_compile import source_of

    def run(launch: Launch) -> None:
        kernel = TritonKernel(source_of(launch), capability, **launch.options)
        arguments = {name: launch.arguments[name] for name in kernel.arg_names}
        kernel.launch(launch.num_programs, arguments, race="raise", uninit="raise")

    return run
