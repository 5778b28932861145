"""adamw by the native kernel, by Triton and by the definition."""

from __future__ import annotations

import importlib

import torch

from pypar.ops import native
from pypar.ops.adamw import definition
from pypar.ops.adamw.arguments import AdamwProblem
from pypar.ops.adamw.blocks import tables
from pypar.ops.adamw.rounding import step_key
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import dtype_refusal, triton_device_refusal
from pypar.ops.rows import native_refusal

_EIGHT_BITS = 3  # kEightBits in csrc/adamw.cpp


def _native_unsupported(problem: AdamwProblem) -> str | None:
    firsts = [column[0] for column in problem.columns if column]  # the tensors of a list are alike
    if not firsts:
        return None
    plain = [x for x in firsts if x.dtype != torch.uint8]  # the codes' arithmetic is the absmaxes'
    if reason := _mixture_refusal(problem):
        return reason
    return next(filter(None, (native_refusal(x, *firsts) for x in plain)), None)


def _mixture_refusal(problem: AdamwProblem) -> str | None:
    """Why no kernel takes the lists together, or None."""
    first, second = ({x.dtype for x in moments} for moments in (problem.exp_avgs, problem.exp_avg_sqs))
    if first != second:
        return f"exp_avgs are {problem.exp_avgs[0].dtype} and exp_avg_sqs {problem.exp_avg_sqs[0].dtype}"
    if problem.masters and problem.masters[0].dtype != torch.float32:
        return f"masters are {problem.masters[0].dtype}, not float32"
    return None


def _rounds_stochastically(problem: AdamwProblem) -> bool:
    stored = problem.exp_avg_sqs if problem.masters else problem.exp_avg_sqs + problem.params
    return problem.seed is not None and any(x.dtype == torch.bfloat16 for x in stored)


def _numbers(problem: AdamwProblem) -> tuple[float, ...]:
    """What all elements share: Numbers of kernels/adamw.py but for the key, and the order of csrc/adamw.cpp."""
    step, beta1, beta2 = problem.step, problem.beta1, problem.beta2
    return (
        problem.factor, 1 - problem.lr * problem.weight_decay, 1 - beta1, beta1, beta2, 1 - beta2,
        problem.lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, problem.eps,
    )  # fmt: skip


def _native_forward(problem: AdamwProblem) -> None:
    if not problem.params:
        return
    moment = _EIGHT_BITS if problem.in_blocks else native.dtype_code(problem.exp_avgs[0])
    kinds = (
        native.dtype_code(problem.params[0]), native.dtype_code(problem.gradients[0]), moment,
        int(_rounds_stochastically(problem)), int(1 - problem.beta1 < 0.5), native.num_threads(),
    )  # fmt: skip
    once = tuple(x if x is None else x.float().cpu() for x in (problem.found_inf, problem.scale))
    native.run(
        native.module().adamw,
        [native.addresses(column) for column in problem.columns], [x.numel() for x in problem.params], problem.places,
        (*once, tables()), _numbers(problem), step_key(problem.seed or 0, problem.step), kinds,
    )  # fmt: skip


def _triton_unsupported(problem: AdamwProblem) -> str | None:
    plain = [column[0] for column in problem.columns if column and column[0].dtype != torch.uint8]
    for x in plain:
        if reason := dtype_refusal(x.dtype):
            return reason
    if reason := _mixture_refusal(problem):
        return reason
    return next(filter(None, map(triton_device_refusal, {x.device for x in problem.params})), None)


def _triton_forward(problem: AdamwProblem) -> None:
    kernels = importlib.import_module("pypar.kernels.adamw")
    key = step_key(problem.seed or 0, problem.step)
    numbers = kernels.Numbers(*_numbers(problem), key - (1 << 64 if key >> 63 else 0))
    for column in problem.columns:
        native.addresses(column)  # refuses tensors without memory, which a table of addresses would hide
    for device in dict.fromkeys(x.device for x in problem.params):
        here = [i for i, x in enumerate(problem.params) if x.device == device]
        lists = tuple([column[i] for i in here] if column else [] for column in problem.columns)
        places = [number for i in here for number in problem.place(i)]
        once = [
            None if x is None else x.to(device, torch.float32) for x in (problem.scale, problem.found_inf)
        ]
        codes = tables(device) if problem.in_blocks else None
        kernels.update(lists, places, numbers, codes, *once, _rounds_stochastically(problem))


BACKENDS = (
    Backend("native", _native_forward, None, _native_unsupported),
    Backend("triton", _triton_forward, None, _triton_unsupported),
    Backend("reference", definition.forward, None, never_refuses),
)
