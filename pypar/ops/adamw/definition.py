"""The update in plain PyTorch: what adamw means, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.adamw.arguments import AdamwProblem
from pypar.ops.adamw.blocks import decode, encode
from pypar.ops.adamw.rounding import random_words, round_by, step_key
from pypar.ops.rows import accumulate_dtype


def forward(problem: AdamwProblem) -> None:
    """The definition."""
    for index in range(len(problem.params)):
        _update(problem, index)


def _update(problem: AdamwProblem, index: int) -> None:
    param = _flat(problem.params[index])
    master = _flat(problem.masters[index]) if problem.masters else param
    wide = accumulate_dtype(master)
    random = None
    if problem.seed is not None and wide == torch.float32:
        key = step_key(problem.seed, problem.step)
        random = random_words(key, problem.place(index), param.numel(), param.device)

    gradient = _flat(problem.gradients[index]).to(wide)
    if problem.scale is None:
        gradient = gradient * problem.factor
    else:
        gradient = gradient * (problem.scale.reshape(()).to(param.device, wide) * problem.factor)
    before = _moment(problem, index, first=True).to(wide)
    difference = gradient - before
    if 1 - problem.beta1 < 0.5:
        m = before + difference * (1 - problem.beta1)
    else:
        m = gradient - difference * problem.beta1
    v = _moment(problem, index, first=False).to(wide) * problem.beta2
    v = v + gradient * (1 - problem.beta2) * gradient
    # In fp64, since what torch's own sqrt of fp32 rounds to differs from one library under it to another.
    root = v.double().sqrt().to(wide) * (1 - problem.beta2**problem.step) ** -0.5 + problem.eps
    step_size = problem.lr / (1 - problem.beta1**problem.step)
    new = master.to(wide) * (1 - problem.lr * problem.weight_decay) - m * step_size / root

    _store_moment(problem, index, m, first=True, random=None)
    _store_moment(problem, index, v, first=False, random=None if random is None else random >> 16)
    if problem.masters:
        _store(problem, master, new, None)
        _store(problem, param, new, None)
    else:
        _store(problem, param, new, None if random is None else random & 0xFFFF)


def _moment(problem: AdamwProblem, index: int, *, first: bool) -> Tensor:
    moment = _flat((problem.exp_avgs if first else problem.exp_avg_sqs)[index])
    if not problem.in_blocks:
        return moment
    absmaxes = problem.exp_avg_absmaxes if first else problem.exp_avg_sq_absmaxes
    return decode(moment, absmaxes[index], signed=first)


def _store_moment(
    problem: AdamwProblem, index: int, x: Tensor, *, first: bool, random: Tensor | None
) -> None:
    target = _flat((problem.exp_avgs if first else problem.exp_avg_sqs)[index])
    if not problem.in_blocks:
        _store(problem, target, x, random)
        return
    codes, absmax = encode(x.float(), signed=first)
    _store(problem, target, codes, None)
    _store(problem, (problem.exp_avg_absmaxes if first else problem.exp_avg_sq_absmaxes)[index], absmax, None)


def _store(problem: AdamwProblem, target: Tensor, x: Tensor, random: Tensor | None) -> None:
    """target = x, rounded to nearest, or by `random` where the target is bf16; nothing where an infinity was found."""
    new = round_by(x, random) if random is not None and target.dtype == torch.bfloat16 else x.to(target.dtype)
    if problem.found_inf is not None:
        new = torch.where(problem.found_inf.reshape(()).to(target.device) != 0, target, new)
    target.copy_(new)


def _flat(x: Tensor) -> Tensor:
    """The elements as they lie in memory, a view."""
    return x.as_strided((x.numel(),), (1,))
