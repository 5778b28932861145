"""What of a plan can be cut, and what of a plan that nobody gave for the model is left whole."""

from __future__ import annotations

from torch import nn

from pypar.axis import Axis
from pypar.parallel.regions import is_cut_inside, listed
from pypar.parallel.roles import ROLES
from pypar.role import WHOLE, Match, Spreading
from pypar.tensor_parallel.sharded import part_length


def left_whole(matches: list[Match], spreading: Spreading, *, may_be_halves: bool) -> dict[str, str]:
    """What pypar cannot cut of a plan that nobody gave for this model, and may leave whole: names, with reasons.

    That are embeddings and heads that are more than they seem; layers beside a subclass of nn.Linear; and, but for
    ``may_be_halves``, layers that are not a pair of column and row, or have linear layers beside them whose names
    say nothing.
    """
    model = spreading.model
    dropped = _not_understood(model, matches, may_be_halves)
    for match in matches:
        if ROLES[match.role].is_optional and (reason := obstacle(match, spreading)) is not None:
            dropped[match.name] = reason
    kept = [match for match in matches if match.name not in dropped]
    while (untied := half_tied(model, kept)) is not None and ROLES[untied[1].role].is_optional:
        name, match = untied
        dropped[match.name] = f"{name} shares its weight and stays whole"
        kept.remove(match)
    return dropped


def _not_understood(model: nn.Module, matches: list[Match], may_be_halves: bool) -> dict[str, str]:
    """Matches whose parent module is not understood as a whole, with the reason."""
    by_parent: dict[str, list[Match]] = {}
    for match in matches:
        if is_cut_inside(match):
            by_parent.setdefault(match.name.rpartition(".")[0], []).append(match)
    reasons: dict[str, str] = {}
    for parent, members in by_parent.items():
        linears = [m for m in members if m.parameter is None]
        known = {id(m.module) for m in linears}
        children = model.get_submodule(parent).named_children()
        unknown = [n for n, child in children if isinstance(child, nn.Linear) and id(child) not in known]
        reason = next((r for m in linears if (r := _other_type(m)) is not None), None)
        if reason is None and not may_be_halves:
            if unknown:
                reason = f"the names of {listed(unknown)} beside it in {listed([parent])} say nothing"
            elif not _is_pair(linears):
                reason = f"{listed([parent]) or 'the model'} has no pair of column and row"
        if reason is not None:
            reasons |= dict.fromkeys((m.name for m in members), reason)
    return reasons


def _is_pair(matches: list[Match]) -> bool:
    roles = [ROLES[match.role] for match in matches]
    return any(role.gives_part for role in roles) and any(role.takes_part for role in roles)


def obstacle(match: Match, spreading: Spreading) -> str | None:
    """Why a module cannot be cut as its role says, as a sentence; None where it can."""
    name, module, role = match.name, match.module, ROLES[match.role]
    axis = spreading.axis(role)
    if match.parameter is not None:
        return _parameter_obstacle(match, axis)
    if role.kind is nn.Module:
        return None
    if (reason := _other_type(match)) is not None:
        return reason
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        *(p._backward_hooks for p in module.parameters()),
        *(getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters()),
    )
    if any(hooks):
        return f"{name} has hooks, which its replacement would lose; register them after parallelize"
    if isinstance(module, nn.Embedding):
        extras = ("max_norm", "scale_grad_by_freq", "sparse")
        if any(getattr(module, extra) for extra in extras):
            return f"{name} uses one of {', '.join(extras)}, which a cut embedding lacks; leave it whole"
    if not role.divides:
        return None
    return _division(f"{role.divides} of {name}", getattr(module, role.divides), axis)


def _other_type(match: Match) -> str | None:
    kind, name, actual = ROLES[match.role].kind, match.name, type(match.module).__name__
    if not isinstance(match.module, kind):
        fitting = (
            r
            for r, role in ROLES.items()
            if role.kind is not nn.Module and isinstance(match.module, role.kind)
        )
        others = ", ".join((*fitting, WHOLE))
        return f"{name} is a {actual}, which cannot be {match.role!r}; use one of: {others}"
    if type(match.module) is not kind and getattr(match.module, "computes_as", None) is not kind:
        return (
            f"{name} is a {actual}, which may compute more than nn.{kind.__name__}; give it (and what is tied to it) "
            "the role 'whole'"
        )
    return None


def _parameter_obstacle(match: Match, axis: Axis) -> str | None:
    role = ROLES[match.role]
    if not role.of_parameters:
        others = ", ".join(name for name, role in ROLES.items() if role.of_parameters)
        return f"{match.name} is a parameter, which cannot be {match.role!r}; use one of: {others}"
    if match.parameter is None or role.cut_dim is None:
        return None
    shape = tuple(getattr(match.module, match.parameter).shape)
    return (
        _division(f"dim 0 of {match.name}", shape[0], axis)
        if shape
        else f"{match.name} has no dimension to cut"
    )


def _division(what: str, total: int, axis: Axis) -> str | None:
    try:
        part_length(what, total, axis)
    except ValueError as error:
        return str(error)
    return None


def half_tied(model: nn.Module, matches: list[Match]) -> tuple[str, Match] | None:
    """A module and a match that share one weight, of which only one is cut or each along another dimension."""
    cut = [m for m in matches if ROLES[m.role].cut_dim is not None and m.parameter is None]
    dims = {id(m.module): ROLES[m.role].cut_dim for m in cut}
    by_weight = {id(m.module.weight): m for m in cut}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            match = by_weight.get(id(parameter))
            if match is not None and dims.get(id(module)) != ROLES[match.role].cut_dim:
                return name, match
    return None
