"""The parts of a model where each rank has its own features: around column-parallel and row-parallel layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from pypar.axis import Axis
from pypar.parallel.roles import ROLES
from pypar.role import Match

HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_heads",
    "n_head",
    "n_kv_heads",
)
CONFIG_HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")


class Inside(NamedTuple):
    """A parameter beside the cut layers of a region, which may see this rank's features or what all ranks have.

    certainty   "declared" by the plan to work on each head, so that its gradient is summed; "guessed" to do so from its
                shape; "unknown"
    """

    name: str
    parameter: nn.Parameter
    certainty: str


class Region(NamedTuple):
    """A module with children that give or take this rank's features alone."""

    name: str
    module: nn.Module
    insides: tuple[Inside, ...]


def is_cut_inside(match: Match) -> bool:
    """Whether a match begins or ends a region."""
    return ROLES[match.role].is_cut_inside


def cuts_layers(match: Match) -> bool:
    """Whether a match makes a layer smaller, and not only the embedding or the head."""
    return is_cut_inside(match) or ROLES[match.role].cut_dim == 1


def cut_axes(matches: list[Match]) -> tuple[str, ...]:
    """The product of axes over which a plan cuts features; () where it cuts none.

    ValueError where it cuts them over several: what one cut layer gives, another takes.
    """
    names: dict[tuple[str, ...], str] = {}
    for match in matches:
        role = ROLES[match.role]
        if role.is_cut_inside or role.cut_dim is not None:
            names.setdefault(role.axes, match.name)
    if len(names) > 1:
        said = " and ".join(f"{name} over {' x '.join(axes)}" for axes, name in names.items())
        raise ValueError(f"the plan cuts {said}; cut the layers of a model over the same axes")
    return next(iter(names), ())


def find_regions(model: nn.Module, matches: list[Match]) -> list[Region]:
    by_parent: dict[str, list[Match]] = {}
    for match in matches:
        if is_cut_inside(match) and match.parameter is None:
            by_parent.setdefault(match.name.rpartition(".")[0], []).append(match)
    declared = {id(p) for m in matches if ROLES[m.role].serves_heads for p in m.parameters()}
    settled = {id(p) for m in matches if not ROLES[m.role].serves_heads for p in m.parameters()}
    cut = {id(m.module) for members in by_parent.values() for m in members}
    regions = []
    for name, members in by_parent.items():
        module, width = model.get_submodule(name), _width(members)
        insides = []
        for where, parameter in _beside(name, module, cut):
            # Vectors of the model's width are norms and biases of what all ranks have.
            if id(parameter) in settled or tuple(parameter.shape) == (width,):
                continue
            certainty = "declared" if id(parameter) in declared else "unknown"
            in_list = any(
                part.isdigit() for part in where[len(name) :].split(".")
            )  # one for each head, perhaps
            if certainty == "unknown" and tuple(parameter.shape) == (head_size_of(module),) and not in_list:
                certainty = "guessed"
            insides.append(Inside(where, parameter, certainty))
        regions.append(Region(name, module, tuple(insides)))
    return regions


def _width(members: list[Match]) -> int:
    """The number of features that a region's input or output has on every rank."""
    for match in members:
        if isinstance(match.module, nn.Linear):
            whole = match.module.in_features, match.module.out_features
            return whole[0] if ROLES[match.role].gives_part else whole[1]
    raise AssertionError("a region is made of linear layers")


def _beside(name: str, module: nn.Module, cut: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module but for those of children in which something is cut."""
    yield from module.named_parameters(name, recurse=False)
    for child_name, child in module.named_children():
        if not any(id(inner) in cut for inner in child.modules()):
            yield from child.named_parameters(f"{name}.{child_name}" if name else child_name)


def head_counts(module: nn.Module) -> dict[str, int]:
    """The numbers of heads that an attention module keeps as its own attributes."""
    return {name: value for name in HEAD_COUNTS if type(value := vars(module).get(name)) is int}


def head_size_of(module: nn.Module) -> int | None:
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if type(size) is int), None)


def check_heads(region: Region, axis: Axis) -> None:
    """ValueError where the ranks do not divide an attention module's numbers of heads."""
    counts, module = head_counts(region.module), region.module
    is_attention = head_size_of(module) is not None or re.search("[Aa]ttention", type(module).__name__)
    if not counts and is_attention:
        config = getattr(module, "config", None)
        counts = {n: value for n in CONFIG_HEAD_COUNTS if type(value := getattr(config, n, None)) is int}
    for name, count in counts.items():
        if count % axis.size:
            divisor = math.gcd(*counts.values())
            divisors = " or ".join(str(d) for d in range(1, divisor + 1) if divisor % d == 0)
            raise ValueError(
                f"{name} ({count}) of {region.name} must divide by the {axis.name} size ({axis.size}); use a "
                f"{axis.name} size of {divisors}"
            )


def listed(names: list[str]) -> str:
    """Names with numbered layers folded into one: layers.*.q_proj."""
    folded = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    shown = list(folded)[:20]
    return ", ".join(shown) + (f" and {len(folded) - 20} more" if len(folded) > 20 else "")
