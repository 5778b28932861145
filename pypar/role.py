"""What a plan can say of a module: the roles that rooms offer, and what they are told when a model is spread.

A room that knows a way to spread a module offers a `Role` for it; `pypar.parallel.roles` registers them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from pypar.mesh import Axis, Mesh


class Match(NamedTuple):
    """One module that a plan names, or one parameter that the module has beside its children, and its role's name."""

    name: str
    module: nn.Module
    role: str
    parameter: str | None = None

    def parameters(self) -> list[nn.Parameter]:
        if self.parameter is not None:
            return [getattr(self.module, self.parameter)]
        return list(self.module.parameters())


@dataclass(frozen=True)
class Spreading:
    """Over what a model is spread, and how: what a role is told.

    mesh: None where nothing is spread, and only questions are asked. context: options of context parallelism, of that
    room's own type; None where the plan has none. instead: other axes in the place of the mesh's, by their names.
    """

    model: nn.Module
    mesh: Mesh | None
    sequence_parallel: bool = False
    context: Any = None
    instead: Mapping[tuple[str, ...], Axis] = field(default_factory=dict)

    def axis(self, role: Role) -> Axis:
        """The axis that a role is about."""
        return self.over(role.axes)

    def over(self, axes: tuple[str, ...]) -> Axis:
        """A product of axes of the mesh, or what stands in its place."""
        if axes in self.instead:
            return self.instead[axes]
        return Axis.single(" x ".join(axes)) if self.mesh is None else self.mesh.axis(*axes)


@dataclass(frozen=True)
class Role:
    """One way to spread a module over axes of a mesh.

    kind        the class of modules that it takes
    axes        the mesh's axes that it is about: where they have one rank, the module stays as it is
    replace     gives the module that stands in the place of a match, or the same one changed. A replacement with a
                function `layouts` is made without values: it gets this rank's parts of the old one's parameters
    cut_dim     the dim of the weight that is cut; None where no weight is
    divides     the attribute of the module that the number of ranks divides; "" where nothing has to
    gives_part, takes_part
                the output, or the input, is this rank's features alone
    of_parameters
                it also takes a bare parameter, which `replace` finds in the match
    is_optional where it is left out, the model is as right, only larger
    join        is told the replacements that stand beside each other in one module
    check       raises ValueError, before the model is changed, for a match that cannot have the role
    sees_positions
                under sequence parallelism its parameters see this rank's positions, and the role sums their gradients
    serves_heads
                its parameters, whole on every rank, work on this rank's features beside cut layers, so that each rank
                has a part of their gradients
    joins_sequences
                with it a model sees all of a sequence that is cut over the axes
    """

    kind: type[nn.Module]
    axes: tuple[str, ...]
    replace: Callable[[Match, Spreading], nn.Module]
    cut_dim: int | None = None
    divides: str = ""
    gives_part: bool = False
    takes_part: bool = False
    of_parameters: bool = False
    is_optional: bool = False
    join: Callable[[list[nn.Module]], None] | None = None
    check: Callable[[Match, Spreading], object] | None = None
    sees_positions: bool = False
    serves_heads: bool = False
    joins_sequences: bool = False

    @property
    def is_cut_inside(self) -> bool:
        """Whether what it makes begins or ends a region in which each rank has its own features."""
        return self.gives_part or self.takes_part


def unchanged(match: Match, spreading: Spreading) -> nn.Module:
    """The `replace` of a role that only says something of a module."""
    return match.module


WHOLE = "whole"  # the name of the role of what stays as it is
ROLES = {WHOLE: Role(nn.Module, (), unchanged, of_parameters=True)}
