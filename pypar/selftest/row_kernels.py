"""Operators whose Triton kernels can be looked at without a GPU, by the cases that their files give for that:

small_cases()       a few numbers and every option: for an interpreter
kernel_cases()      the same where some bytes are moved more often than once, or never
compiled_cases()    sizes as models have them: for a compiler
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from pypar.kernels.launch import Launch, launches_go_to
from pypar.ops.backend import op_modules
from pypar.selftest.case import Case
from pypar.selftest.judge import draw_inputs


def cases_module(op: str) -> ModuleType:
    return importlib.import_module(f"pypar.selftest.cases.{op}")


def operators(cases: str = "small_cases") -> list[str]:
    """Those with a Triton backend and these cases; attention has tests of its own."""
    names = [m.__name__.rsplit(".", 1)[1] for m in op_modules() if "triton" in {b.name for b in m.BACKENDS}]
    return [name for name in names if hasattr(cases_module(name), cases)]


def launches_of(case: Case, dtype: torch.dtype) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and of backward, of which a case without gradients has none. None is run."""
    found: list[Launch] = []
    with launches_go_to(found.append):
        inputs = draw_inputs(case, dtype)
        out = case.ours(**inputs, backend="triton")
        outs = out if isinstance(out, tuple) else (out,)
        forward = len(found)
        wanted = [inputs[name] for name in case.gradients]
        if wanted:
            torch.autograd.grad(outs, wanted, [torch.ones_like(x) for x in outs])
    return found[:forward], found[forward:]
