"""What moe_permute and moe_combine compute, in plain PyTorch.

places [T, k] says which row each choice has: a number >= 0, or ~row (-1 - row) of a choice without an expert. Together
they name every row once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype

Order = tuple[Tensor, Tensor, Tensor]


def reference_order(experts: Tensor, num_experts: int) -> Order:
    """(counts [E], places [T, k], sources [T k]), as `Permuted` has them."""
    flat = experts.flatten()
    if flat.device.type == "cpu":
        wrong = (flat < -1) | (flat >= num_experts)
        if wrong.any():
            raise out_of_range(int(flat[wrong][0]), num_experts)
    dropped = flat < 0
    sources = torch.where(dropped, num_experts, flat).argsort(stable=True)
    rows = torch.empty_like(sources)
    rows[sources] = torch.arange(len(sources), device=sources.device)
    choices = torch.arange(num_experts, device=flat.device)
    counts = (flat.unsqueeze(0) == choices.unsqueeze(1)).sum(1)
    return counts, torch.where(dropped, ~rows, rows).view(experts.shape), sources


def reference_forward(x: Tensor, places: Tensor) -> Tensor:
    """rows [T k, D]: each token at the rows of its choices, zeros at those without an expert."""
    return _scatter(x.unsqueeze(1).expand(-1, places.shape[1], -1), places)


def reference_backward(drows: Tensor, places: Tensor) -> Tensor:
    """dx [T, D]: the sum of the gradients of a token's rows, in the order of its choices."""
    return reference_combine_forward(drows, places, None)


def reference_combine_forward(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """out [T, D]: the sum of a token's rows times their weights, in the order of its choices."""
    check_places(places, len(rows))
    wide = _gather(rows, places).to(accumulate_dtype(rows))
    if weights is not None:
        wide = wide * weights.to(wide.dtype).unsqueeze(-1)
    out = wide.new_zeros(wide.shape[0], wide.shape[2])
    for j in range(places.shape[1]):
        out = out + torch.where((places[:, j] < 0).unsqueeze(-1), 0.0, wide[:, j])
    return out.to(rows.dtype)


def reference_combine_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(drows [T k, D], dweights [T, k] in the dtype that is computed in; without rows [0])."""
    wide = dout.to(accumulate_dtype(dout)).unsqueeze(1).expand(-1, places.shape[1], -1)
    scaled = wide if weights is None else wide * weights.to(wide.dtype).unsqueeze(-1)
    drows = _scatter(scaled.to(dout.dtype), places)
    if rows is None:
        return drows, wide.new_empty(0)
    dweights = (wide * _gather(rows, places).to(wide.dtype)).sum(-1)
    return drows, torch.where(places < 0, 0.0, dweights)


def out_of_range(expert: int, num_experts: int) -> ValueError:
    return ValueError(
        f"experts contains {expert}, and must hold numbers in [0, num_experts = {num_experts}), or -1 for a choice "
        "that no expert takes"
    )


def check_places(places: Tensor, num_rows: int) -> None:
    """ValueError unless places, on CPU, name each of the rows once."""
    if places.device.type != "cpu":
        return
    flat = places.flatten()
    rows = torch.where(flat < 0, ~flat, flat)
    if len(rows) and not (
        int(rows.max()) < num_rows and bool((rows.bincount(minlength=num_rows) == 1).all())
    ):
        raise ValueError(
            "places must name each row of [0, T k) once, as moe_permute returns them; what was received from other "
            "ranks has places of its own, by a moe_permute of what was received"
        )


def _gather(rows: Tensor, places: Tensor) -> Tensor:
    return rows[torch.where(places < 0, ~places, places)]


def _scatter(values: Tensor, places: Tensor) -> Tensor:
    """values [T, k, D] at their rows; zeros where places are negative."""
    kept = torch.where((places < 0).unsqueeze(-1), torch.zeros((), dtype=values.dtype), values)
    rows = torch.where(places < 0, ~places, places)
    out = torch.empty(rows.numel(), values.shape[-1], dtype=values.dtype, device=values.device)
    out[rows.flatten()] = kept.flatten(0, 1)
    return out
