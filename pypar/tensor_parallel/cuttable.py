"""What of a plan can be cut, and what of a plan that nobody gave for the model is left whole."""

from __future__ import annotations

from torch import nn

from pypar.mesh import Axis
from pypar.tensor_parallel.regions import Match, listed
from pypar.tensor_parallel.sharded import part_length

STYLES: dict[str, type[nn.Module]] = {
    "column": nn.Linear,
    "row": nn.Linear,
    "column_gather": nn.Linear,
    "row_split": nn.Linear,
    "latent_kv": nn.Linear,
    "vocab": nn.Embedding,
    "per_head": nn.Module,
    "whole": nn.Module,
}
CUT_DIM = {"column": 0, "column_gather": 0, "vocab": 0, "row": 1, "row_split": 1}
# Cuts that take the same on every rank and give the same: left out, the model is as right, only larger.
OPTIONAL = ("vocab", "column_gather", "row_split")


def left_whole(model: nn.Module, matches: list[Match], axis: Axis, *, may_be_halves: bool) -> dict[str, str]:
    """What pypar cannot cut of a plan that nobody gave for this model, and may leave whole: names, with reasons.

    That are embeddings and heads that are more than they seem; layers beside a subclass of nn.Linear; and, but for
    ``may_be_halves``, layers that are not a pair of column and row, or have linear layers beside them whose names
    say nothing.
    """
    dropped = _not_understood(model, matches, may_be_halves)
    for match in matches:
        if match.style in OPTIONAL and (reason := obstacle(match, axis)) is not None:
            dropped[match.name] = reason
    kept = [match for match in matches if match.name not in dropped]
    while (untied := half_tied(model, kept)) is not None and untied[1].style in OPTIONAL:
        name, match = untied
        dropped[match.name] = f"{name} shares its weight and stays whole"
        kept.remove(match)
    return dropped


def _not_understood(model: nn.Module, matches: list[Match], may_be_halves: bool) -> dict[str, str]:
    """Matches whose parent module is not understood as a whole, with the reason."""
    by_parent: dict[str, list[Match]] = {}
    for match in matches:
        if match.style in ("column", "row"):
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
            elif not {"column", "row"} <= {m.style for m in linears}:
                reason = f"{listed([parent]) or 'the model'} has no pair of column and row"
        if reason is not None:
            reasons |= dict.fromkeys((m.name for m in members), reason)
    return reasons


def obstacle(match: Match, axis: Axis) -> str | None:
    """Why a module cannot be cut as its style says, as a sentence; None where it can."""
    name, module, style, _ = match
    if match.parameter is not None or style == "per_head":
        return _parameter_obstacle(match, axis)
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
    if style == "latent_kv":
        return None
    sides = {"vocab": "num_embeddings", "row": "in_features", "row_split": "in_features"}
    side = sides.get(style, "out_features")
    return _division(f"{side} of {name}", getattr(module, side), axis)


def _other_type(match: Match) -> str | None:
    kind, name, actual = STYLES[match.style], match.name, type(match.module).__name__
    if not isinstance(match.module, kind):
        others = ", ".join(s for s, k in STYLES.items() if isinstance(match.module, k))
        return f"{name} is a {actual}, which cannot be {match.style!r}; use one of: {others}"
    if type(match.module) is not kind:
        return (
            f"{name} is a {actual}, which may compute more than nn.{kind.__name__}; give it (and what is tied to it) "
            "the style 'whole'"
        )
    return None


def _parameter_obstacle(match: Match, axis: Axis) -> str | None:
    if match.style not in ("column", "per_head"):
        return f"{match.name} is a parameter, which cannot be {match.style!r}; use one of: column, per_head, whole"
    if match.style == "per_head" or match.parameter is None:
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
    cut = [m for m in matches if m.style in CUT_DIM and m.parameter is None]
    dims = {id(m.module): CUT_DIM[m.style] for m in cut}
    by_weight = {id(m.module.weight): m for m in cut}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            match = by_weight.get(id(parameter))
            if match is not None and dims.get(id(module)) != CUT_DIM[match.style]:
                return name, match
    return None
