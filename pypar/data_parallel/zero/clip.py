"""The norm of gradients of which each rank has rows, and their scaling to a largest one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pypar.comm import all_reduce_start
from pypar.layout import answers_for
from pypar.mesh import Mesh
from pypar.owned import Owned


@torch.no_grad()
def clip(owned: Sequence[Owned], max_norm: float, mesh: Mesh) -> Tensor:
    """Scale gradients to a norm over all ranks of at most ``max_norm``; returns the norm before, fp32, on every rank.

    Squares are summed in fp64 and the norm is rounded once, so that it does not depend on how rows are cut.
    """
    gradients = [each.gradient for each in owned]
    counted = [each.gradient for each in owned if answers_for(each.layout, mesh.grid, mesh.rank)]
    device = gradients[0].device if gradients else torch.device("cpu")
    square_sum = torch.zeros(1, dtype=torch.float64, device=device)
    for gradient in counted:
        square_sum += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    norm = all_reduce_start(square_sum, mesh.world).wait()[0].sqrt().float()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), factor, torch.ones_like(factor))
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return norm
