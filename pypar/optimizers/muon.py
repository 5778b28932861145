"""Muon: momentum whose matrices are made orthogonal (Jordan, kellerjordan.github.io/posts/muon; arXiv 2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pypar.layout import local_tensor
from pypar.ops.uncompiled import uncompiled

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with the same arguments and state, which also takes stacks and fused weights.

    A parameter is a matrix [m, n], or a stack [E, m, n] of experts' matrices, each made orthogonal by itself.
    A group with `rows` (q, k and v: [D, D / 4, D / 4], say) has weights that are several matrices under one another, of
    so many rows each, and treats each by itself. A weight that tensor parallelism cut is gathered: every rank of its
    axis steps at the same time and does the whole matrix's work. Embeddings, heads and vectors belong to AdamW.

    lr, weight_decay   the decay is decoupled and takes lr itself; the update takes lr adjusted by `adjust_lr_fn`:
                       "original" (or None) sqrt(max(1, m / n)), "match_rms_adamw" 0.2 sqrt(max(m, n))
    momentum, nesterov, ns_coefficients, ns_steps, eps   as in torch

    ValueError: a parameter that is neither a matrix nor a stack, a DTensor, `rows` that do not add up to a weight's.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "rows": rows,
        }
        super().__init__(params, self.defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("rows", None)  # torch's has none

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, after a look at what the group asks for."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay", "momentum"):
            if float(group[name]) < 0:
                raise ValueError(f"{name} ({group[name]}) must be at least 0")
        if group["adjust_lr_fn"] not in _ADJUSTMENTS or not 0 <= group["ns_steps"] < 100:
            raise ValueError(
                f"adjust_lr_fn ({group['adjust_lr_fn']!r}) must be one of {_ADJUSTMENTS}, and ns_steps "
                f"({group['ns_steps']}) below 100"
            )
        for param in group["params"]:
            _check(param, group["rows"])

    @uncompiled("it writes into parameters and makes their state at the first step")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[param], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        moment = state["momentum_buffer"]
        moment.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(moment, momentum) if group["nesterov"] else moment
        if _is_cut(param):
            update = update.full_tensor()  # type: ignore[union-attr]
        lr = float(group["lr"])
        parts = update.split(list(group["rows"] or (update.shape[-2],)), -2)
        changes = [
            (_adjusted(lr, group["adjust_lr_fn"], part.shape), orthogonal(part, group)) for part in parts
        ]
        param.mul_(1 - lr * group["weight_decay"])
        if not _is_cut(param):
            for target, (factor, change) in zip(
                param.split([x.shape[-2] for x in parts], -2), changes, strict=True
            ):
                target.add_(change, alpha=-factor)
            return
        whole = torch.cat([change.to(param.dtype) * -factor for factor, change in changes], -2)
        local_tensor(param).add_(local_tensor(param.part_of(whole)))  # type: ignore[attr-defined]


def orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """update [..., m, n] in bf16 with singular values near 1, by Newton and Schulz's iteration, as torch has it.

    With X of norm at most 1, A = X X^T and (a, b, c) the coefficients: X = a X + (b A + c A A) X, ns_steps times. The
    coefficients grow small singular values quickly and leave all of them between about 0.5 and 1.5.
    """
    a, b, c = group["ns_coefficients"]
    x = update.bfloat16()
    is_tall = update.shape[-2] > update.shape[-1]
    if is_tall:
        x = x.mT
    norm = x.norm() if x.dim() == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=group["eps"])
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _adjusted(lr: float, how: str | None, shape: torch.Size) -> float:
    m, n = shape[-2:]
    return lr * (0.2 * math.sqrt(max(m, n)) if how == "match_rms_adamw" else math.sqrt(max(1, m / n)))


def _is_cut(param: Tensor) -> bool:
    """Whether this rank holds a part of the parameter."""
    return hasattr(param, "part_of")


def _check(param: Tensor, rows: Sequence[int] | None) -> None:
    if param.dim() not in (2, 3) or param.is_complex():
        raise ValueError(
            f"Muon takes real matrices [m, n] and stacks [E, m, n] of them, not a parameter {tuple(param.shape)} of "
            f"{param.dtype}; give vectors and embeddings to AdamW"
        )
    if hasattr(param, "device_mesh"):
        raise ValueError(
            f"a DTensor {tuple(param.shape)} would have each rank's part made orthogonal by itself; update whole "
            "matrices, or cut the model with pypar.parallelize, whose weights Muon gathers"
        )
    if rows is not None and sum(rows) != param.shape[-2]:
        raise ValueError(
            f"rows {tuple(rows)} add up to {sum(rows)}, and the weight {tuple(param.shape)} has {param.shape[-2]}; "
            "give the rows of each of its matrices"
        )
