"""Sums of gradients beyond data parallelism: weights whose gradient each rank holds only a part of."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm import all_reduce_start
from ..layout import layout_of, local_tensor
from ..mesh import Axis, Mesh


def tied_embedding_axis(mesh: Mesh) -> Axis | None:
    """The first and last pipeline stage of this rank's column, which both hold a tied embedding; None in between.

    Makes process groups, so every rank of the mesh calls it, once.
    """
    if mesh.pp.size <= 2:
        return mesh.pp if mesh.pp.size == 2 else None
    assert mesh.device_mesh is not None
    ranks = mesh.device_mesh.mesh  # [pp, dp, cp, tp]
    own = None
    for column in ranks[[0, -1]].flatten(1).T.tolist():
        group = dist.new_group(column)
        if dist.get_rank() in column:
            own = Axis.of(group, name="tied")
    return own


class PartialGradients:
    """Sums over tp what sequence parallelism leaves partial, over pp the tied embedding; after the data axis."""

    def __init__(self, gradients: Mapping[nn.Parameter, Tensor], mesh: Mesh) -> None:
        self.mesh, self.gradients = mesh, {p: local_tensor(gradient) for p, gradient in gradients.items()}
        self.partial = [p for p in gradients if "tp" in layout_of(p).gradient_sum_axes and mesh.tp.size > 1]
        self.tied: tuple[Tensor, Axis] | None = None

    def tie(self, parameter: nn.Parameter, axis: Axis) -> None:
        """``parameter`` lives on every rank of ``axis``; its gradient is the sum of theirs."""
        self.tied = (self.gradients[parameter], axis)

    @torch.no_grad()
    def sum(self) -> None:
        """Both reductions are under way together; small gradients travel as one buffer."""
        tied = all_reduce_start(self.tied[0], self.tied[1]) if self.tied else None
        if self.partial:
            parts = [self.gradients[p] for p in self.partial]
            whole = all_reduce_start(torch.cat([g.flatten() for g in parts]), self.mesh.tp).wait()
            for gradient, summed in zip(parts, whole.split([g.numel() for g in parts]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        if tied is not None:
            tied.wait()
