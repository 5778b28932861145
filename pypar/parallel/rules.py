"""What a plan means for one model. What can be refused is refused here, before the model is changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from pypar.parallel.cuttable import half_tied, left_whole, obstacle
from pypar.parallel.plan import ParallelPlan
from pypar.parallel.regions import Region, check_heads, cut_axes, cuts_layers, find_regions, listed
from pypar.parallel.roles import ROLES, kinds
from pypar.parallel.shipped import shipped_matches
from pypar.role import WHOLE, Match, Spreading
from pypar.tensor_parallel.roles import USUAL_PLAN
from pypar.tensor_parallel.sharded import ShardedModule


class Reading(NamedTuple):
    """What a plan means for one model.

    matches      the modules and parameters that have a role
    axes         the product of axes over which features are cut
    regions      where each rank has its own features
    is_complete  the plan comes with the model and leaves nothing beside the cut layers open
    is_given     the plan is the user's
    notes        sentences on what the plan's source would cut and pypar leaves whole
    """

    matches: list[Match]
    axes: tuple[str, ...]
    regions: list[Region]
    is_complete: bool
    is_given: bool
    notes: list[str]


def own_plan(model: nn.Module) -> Mapping[str, str] | None:
    """The roles that the model's class gives to its modules, as pypar's own models do; None where it has none."""
    plan = getattr(type(model), "parallel_plan", None)
    return plan if isinstance(plan, Mapping) else None


def read_plan(plan: ParallelPlan, spreading: Spreading) -> Reading:
    """The modules that a plan names. Without roles: the model's own, what transformers ships with it, `USUAL_PLAN`.

    ValueError, by a sentence, for a plan that is not clear, finds nothing, or cannot be carried out on this mesh.
    """
    model, roles = spreading.model, plan.roles
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError(
            "the model has tensor-parallel layers already; call parallelize once, on the whole model"
        )
    notes: list[str] = []
    own = own_plan(model) if roles is None else None
    shipped = shipped_matches(model) if roles is None and own is None else None
    matches = shipped or _find(model, next(each for each in (roles, own, USUAL_PLAN) if each is not None))
    if roles is not None:
        _check_found(model, matches, roles)
    elif own is None:
        matches = _understood(matches, spreading, notes, may_be_halves=shipped is not None)
    for match in matches:
        if (reason := obstacle(match, spreading)) is not None:
            raise ValueError(reason)
        if (check := ROLES[match.role].check) is not None:
            check(match, spreading)
    untied = half_tied(model, matches)
    if untied is not None:
        raise ValueError(
            f"{untied[0]} and {untied[1].name} share one weight, but the plan would cut only one of them, or "
            "each along another dimension; give both, as an embedding 'vocab' and a head "
            "'column_gather', or neither"
        )
    if plan.sequence_parallel:
        _check_all_have_roles(model, matches)
    regions, axes = find_regions(model, matches), cut_axes(matches)
    for region in regions:
        check_heads(region, spreading.over(axes))
    is_open = any(inside.certainty != "declared" for region in regions for inside in region.insides)
    is_complete = (shipped is not None or own is not None) and not is_open
    return Reading(matches, axes, regions, is_complete, roles is not None, notes)


def plan_of(model: nn.Module) -> dict[str, str]:
    """The roles that ``pypar.parallelize(model, mesh)`` would give: patterns of module names to names of roles.

    A start for a plan of one's own, in which the first pattern that fits counts:

        {"*.mlp.*": "whole", **plan_of(model)}

    ValueError as `parallelize` for a model without a plan.
    """
    reading = read_plan(ParallelPlan(), Spreading(model, None))
    return {listed([match.name]): match.role for match in reading.matches}


def _find(model: nn.Module, plan: Mapping[str, str]) -> list[Match]:
    for pattern, role in plan.items():
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"use one of {', '.join(ROLES)}"
            raise ValueError(f"the plan gives {pattern!r} the unknown role {role!r}; {hint}")
    matches = []
    for match in _named(model):
        role = next((role for pattern, role in plan.items() if _fits(match.name, pattern)), WHOLE)
        if role != WHOLE and _takes(match, role):
            matches.append(match._replace(role=role))
    return matches


def _named(model: nn.Module) -> Iterator[Match]:
    """All modules without children, and parameters that stand beside a module's children, such as sinks."""
    for name, module in model.named_modules():
        if name and (not module._modules or isinstance(module, kinds())):
            yield Match(name, module, WHOLE)
        elif name:
            yield from (
                Match(f"{name}.{own}", module, WHOLE, own)
                for own, p in module._parameters.items()
                if p is not None
            )


def _takes(match: Match, name: str) -> bool:
    """Whether a role is meant for such a thing at all: names of layers are also names of experts' 3-D weights."""
    role = ROLES[name]
    if match.parameter is not None:
        is_small = getattr(match.module, match.parameter).dim() <= 2
        return role.of_parameters and (role.cut_dim is None or is_small)
    return role.kind is nn.Module or isinstance(match.module, kinds())


def _fits(name: str, pattern: str) -> bool:
    """fnmatch on the whole module name; "*.x" also means an x at the top."""
    return fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern)


def _check_all_have_roles(model: nn.Module, matches: list[Match]) -> None:
    """Under sequence parallelism a parameter that is not cut sees a part of the positions."""
    said = {
        id(p)
        for m in matches
        for p in m.parameters()
        if ROLES[m.role].cut_dim is not None or ROLES[m.role].sees_positions
    }
    silent = [name for name, p in model.named_parameters() if id(p) not in said]
    if silent:
        fitting = " or ".join(f'"{name}"' for name, role in ROLES.items() if role.sees_positions)
        raise ValueError(
            f"sequence parallelism needs a role for every parameter, and the plan says nothing of {listed(silent)}: "
            f"give what sees a part of the positions the role {fitting}, or leave sequence_parallel out"
        )


def _check_found(model: nn.Module, matches: list[Match], plan: Mapping[str, str]) -> None:
    seen = _seen(model)
    if not plan:
        raise ValueError(f"the plan is empty; {seen}. Give None for the usual names")
    for pattern, role in plan.items():
        names = [m.name for m in _named(model) if _takes(m, role)]
        # What starts from the usual plan has names of other models too.
        if USUAL_PLAN.get(pattern) == role or any(_fits(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(
            pattern.rpartition(".")[2], [n.rpartition(".")[2] for n in names], n=1
        )
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"the plan's pattern {pattern!r} matches no module; {hint}In this model {seen}")
    if not matches:
        raise ValueError(f"the plan cuts nothing of this {type(model).__name__}; {seen}")


def _seen(model: nn.Module) -> str:
    layers = (nn.Linear, nn.Embedding)
    names = [name for name, module in model.named_modules() if isinstance(module, layers)]
    return (
        f"its linear layers and embeddings are called {listed(names)}" if names else "it has no linear layer"
    )


def _understood(
    matches: list[Match], spreading: Spreading, notes: list[str], *, may_be_halves: bool
) -> list[Match]:
    """The matches of a plan that nobody gave, without what is left whole, of which ``notes`` get a sentence each."""
    model = spreading.model
    dropped = left_whole(matches, spreading, may_be_halves=may_be_halves)
    kept = [match for match in matches if match.name not in dropped]
    if not any(map(cuts_layers, kept)):
        first = next((f", and {reason}" for reason in dropped.values()), "")
        raise ValueError(
            f"parallelize knows no nn.Linear of this {type(model).__name__}'s layers by its name{first}; "
            f'{_seen(model)}. Give a plan such as {{"*.up": "column", "*.down": "row"}}'
        )
    by_reason: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        by_reason.setdefault(listed([reason]), []).append(name)
    notes += [f"parallelize leaves {listed(names)} whole: {reason}" for reason, names in by_reason.items()]
    return kept
