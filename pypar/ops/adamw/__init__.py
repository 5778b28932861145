"""One update of AdamW over many tensors in one pass (Loshchilov and Hutter, arXiv 1711.05101).

arguments.py   the numbers of an update, and the checks of the tensors
definition.py  the update in plain PyTorch
blocks.py      moments in 8 bits
rounding.py    stochastic rounding to bf16
backends.py    the update by the native kernel, by Triton and by the definition
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pypar.ops.adamw.arguments import AdamwProblem, Moments, Place, Update, problem_of
from pypar.ops.adamw.backends import BACKENDS
from pypar.ops.adamw.blocks import Blocks, from_blocks, to_blocks, zero_blocks
from pypar.ops.backend import choose
from pypar.ops.register import define

__all__ = ["BACKENDS", "Blocks", "Place", "Update", "adamw", "from_blocks", "to_blocks", "zero_blocks"]


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
    after each operation, in the definition and in every backend: cuts, threads, processors and GPUs change no bit (a
    cut of `Blocks` must be at a whole block). Not differentiable. ValueError: tensors that do not belong together, a
    backend that refuses.
    """
    problem = problem_of(params, gradients, exp_avgs, exp_avg_sqs, update, masters, scale, found_inf, places)
    chosen = choose("adamw", BACKENDS, {"problem": problem}, backend)
    _update(*problem, chosen.name)


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
