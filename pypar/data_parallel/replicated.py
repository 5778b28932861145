"""The plain store: every rank of the data axis has all parameters, gradients and masters of its part of the model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pypar.data_parallel.gradients import Gradients
from pypar.layout import Layout, layout_of, local_tensor
from pypar.mesh import Axis, Mesh
from pypar.owned import Owned


class Replicated:
    """A `pypar.data_parallel.store.Store`: gradients are summed in buckets while backward runs.

    A parameter below fp32 has an fp32 master; one of fp32 is its own. Gradients are fp32.

    named_parameters  (name in the whole model, parameter), of which those are taken that are trained; every rank of
                      the mesh makes its store at the same time
    bucket_bytes      of gradients that are reduced at once
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, *, bucket_bytes: int
    ) -> None:
        named = list(named_parameters)
        self._parameters = {name: p for name, p in named if p.requires_grad}
        self.mesh = mesh
        self._frozen = {name: p for name, p in named if not p.requires_grad}
        self._gradients = Gradients(
            self._parameters.values(),
            mesh,
            bucket_bytes=bucket_bytes,
            gradient_dtype=torch.float32,
            rebuild=False,  # a resumed run has the buckets of one that was not interrupted
        )
        self._owned = []
        for name, parameter in self._parameters.items():
            master = local_tensor(parameter).detach().float()  # the parameter itself where it is fp32
            gradient = local_tensor(self._gradients.gradient(parameter))
            self._owned.append(Owned(name, master, gradient, layout_of(parameter)))

    @property
    def axes(self) -> list[Axis]:
        """The axes over which gradients are summed."""
        return self._gradients.axes

    def owned(self) -> list[Owned]:
        """Every trained parameter of this rank's part of the model."""
        return self._owned

    def frozen(self) -> dict[str, tuple[Tensor, Layout]]:
        """All parameters that are not trained."""
        return {name: (local_tensor(p).detach(), layout_of(p)) for name, p in self._frozen.items()}

    def holds_states_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Masters stay where they are, and so do states."""

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, backward adds to the gradients and starts no reduction."""
        return self._gradients.accumulate()

    def reduce(self) -> None:
        """Wait until gradients are sums over their layouts' axes."""
        self._gradients.finish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into parameters of other dtypes."""
        for owned in self._owned:
            parameter = self._parameters[owned.name]
            if parameter.dtype != torch.float32:
                local_tensor(parameter).copy_(owned.master)

    def zero(self) -> None:
        """Set all gradients to zero."""
        self._gradients.zero()
