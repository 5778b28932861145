"""One update of AdamW over many tensors in one pass (Loshchilov and Hutter, arXiv 1711.05101).

arguments.py   the numbers of an update, and the checks of the tensors
definition.py  the update in plain PyTorch
blocks.py      moments in 8 bits
rounding.py    stochastic rounding to bf16
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.adamw import definition
from pypar.ops.adamw.arguments import AdamwProblem, Moments, Place, Update, problem_of
from pypar.ops.adamw.blocks import Blocks, from_blocks, tables, to_blocks, zero_blocks
from pypar.ops.adamw.rounding import step_key
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.register import define
from pypar.ops.rows import native_refusal

__all__ = ["Blocks", "Place", "Update", "adamw", "from_blocks", "to_blocks", "zero_blocks"]

_EIGHT_BITS = 3  # kEightBits in csrc/adamw.cpp


def adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Moments,
    exp_avg_sqs: Moments,
    update: Update,
    *,
    masters: Sequence[Tensor] | None = None,
    scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    places: Sequence[Place] | None = None,
    backend: str | None = None,
) -> None:
    """torch.optim.AdamW's update of every tensor of the list, which may be one flat tensor, in place.

    With g = gradient * scale (its negative to maximize), betas b and c, and t = update.step:

        m = b m + (1 - b) g          v = c v + (1 - c) g^2
        p = p (1 - lr weight_decay) - lr / (1 - b^t) m / (sqrt(v / (1 - c^t)) + eps)

    params       fp32, bf16 or fp16; written, and read where there are no masters
    gradients    fp32, bf16 or fp16
    masters      fp32, updated in place of the parameters, which become their rounded copies
    exp_avgs, exp_avg_sqs   m and v: fp32, bf16, fp16, or `Blocks` of 8 bits
    scale        one factor of the gradients, 1 / loss scale and clipping together: a number or a tensor of one
    found_inf    a tensor of one number; where it is not 0 nothing changes
    places       where the elements are in a whole, for stochastic rounding; without it tensors follow one another

    Each list has tensors of one dtype, which lie in memory as their parameters do. All is computed in fp32 and rounded
    after each operation, in the definition and in every backend on the CPU: cuts, threads and processors change no bit
    (a cut of `Blocks` must be at a whole block). Not differentiable. ValueError: tensors that do not belong together, a
    backend that refuses.
    """
    problem = problem_of(params, gradients, exp_avgs, exp_avg_sqs, update, masters, scale, found_inf, places)
    chosen = choose("adamw", BACKENDS, {"problem": problem}, backend)
    _update(*problem, chosen.name)


def _native_unsupported(problem: AdamwProblem) -> str | None:
    firsts = [column[0] for column in problem.columns if column]  # the tensors of a list are alike
    if not firsts:
        return None
    plain = [x for x in firsts if x.dtype != torch.uint8]  # the codes' arithmetic is the absmaxes'
    if problem.masters and problem.masters[0].dtype != torch.float32:
        return f"masters are {problem.masters[0].dtype}, not float32"
    return next(filter(None, (native_refusal(x, *firsts) for x in plain)), None)


def _rounds_stochastically(problem: AdamwProblem) -> bool:
    stored = problem.exp_avg_sqs if problem.masters else problem.exp_avg_sqs + problem.params
    return problem.seed is not None and any(x.dtype == torch.bfloat16 for x in stored)


def _native_forward(problem: AdamwProblem) -> None:
    if not problem.params:
        return
    step, beta1, beta2 = problem.step, problem.beta1, problem.beta2
    numbers = (
        problem.factor, 1 - problem.lr * problem.weight_decay, 1 - beta1, beta1, beta2, 1 - beta2,
        problem.lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, problem.eps,
    )  # fmt: skip
    moment = _EIGHT_BITS if problem.in_blocks else native.dtype_code(problem.exp_avgs[0])
    kinds = (
        native.dtype_code(problem.params[0]), native.dtype_code(problem.gradients[0]), moment,
        int(_rounds_stochastically(problem)), int(1 - beta1 < 0.5), native.num_threads(),
    )  # fmt: skip
    once = tuple(x if x is None else x.float().cpu() for x in (problem.found_inf, problem.scale))
    native.run(
        native.module().adamw,
        [native.addresses(column) for column in problem.columns], [x.numel() for x in problem.params], problem.places,
        (*once, tables()), numbers, step_key(problem.seed or 0, step), kinds,
    )  # fmt: skip


BACKENDS = (
    Backend("native", _native_forward, None, _native_unsupported),
    Backend("reference", definition.forward, None, never_refuses),
)
_FORWARD = {backend.name: backend.forward for backend in BACKENDS}


def _run(*arguments: Any) -> None:
    _FORWARD[arguments[-1]](AdamwProblem(*arguments[:-1]))


def _fake(*arguments: Any) -> None:
    return None


_update = define(
    "adamw_update",
    "(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] exp_avg_absmaxes, Tensor(f!)[] exp_avg_sq_absmaxes, Tensor? scale, Tensor? found_inf, float factor, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step, int? seed, int[] places, "
    "str backend) -> ()",
    _run,
    _fake,
)
