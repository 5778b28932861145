"""Which modules of a ready model are cut over tp, and how. What can be refused is refused here, before a
swap."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from pypar.mesh import Axis
from pypar.tensor_parallel.cuttable import STYLES, half_tied, left_whole, obstacle
from pypar.tensor_parallel.latent import num_shared_features
from pypar.tensor_parallel.regions import Match, Region, check_heads, find_regions, listed
from pypar.tensor_parallel.sharded import ShardedModule
from pypar.tensor_parallel.shipped import shipped_matches

USUAL_PLAN = {
    "*.q_proj": "column",
    "*.k_proj": "column",
    "*.v_proj": "column",
    "*.sinks": "column",
    "*.query_key_value": "column",
    "*.o_proj": "row",
    "*.out_proj": "row",
    "*.self_attn.dense": "row",
    "*.attention.dense": "row",
    "*.gate_proj": "column",
    "*.up_proj": "column",
    "*.down_proj": "row",
    "*.fc1": "column",
    "*.fc2": "row",
    "*.dense_h_to_4h": "column",
    "*.dense_4h_to_h": "row",
    "*.embed_tokens": "vocab",
    "*.embed_in": "vocab",
    "*.lm_head": "column_gather",
    "*.embed_out": "column_gather",
}


class Reading(NamedTuple):
    """What a plan means for one model.

    matches     the modules and parameters to be cut
    regions     where each rank has its own features
    is_shipped  the plan comes with the model's configuration and leaves nothing beside the cut layers open
    is_given    the plan is the user's
    notes       sentences on what the plan's source would cut and pypar leaves whole
    """

    matches: list[Match]
    regions: list[Region]
    is_shipped: bool
    is_given: bool
    notes: list[str]


def read_plan(model: nn.Module, plan: Mapping[str, str] | None, axis: Axis) -> Reading:
    """The modules that ``plan`` names (None: what transformers ships with the model, else `USUAL_PLAN`).

    ValueError, by a sentence, for a plan that is not clear, finds nothing, or cannot be carried out on this
    axis.
    """
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError(
            "the model has tensor-parallel layers already; call parallelize once, on the whole model"
        )
    notes: list[str] = []
    shipped = shipped_matches(model) if plan is None else None
    matches = shipped or _find(model, USUAL_PLAN if plan is None else plan)
    if plan is not None:
        _check_found(model, matches, plan)
    else:
        matches = _understood(model, matches, axis, notes, may_be_halves=shipped is not None)
    for match in matches:
        if (reason := obstacle(match, axis)) is not None:
            raise ValueError(reason)
        if match.style == "latent_kv":
            num_shared_features(model, match.name)
    untied = half_tied(model, matches)
    if untied is not None:
        raise ValueError(
            f"{untied[0]} and {untied[1].name} share one weight, but the plan would cut only one of them, or "
            "each along another dimension; give both, as an embedding 'vocab' and a head "
            "'column_gather', or neither"
        )
    regions = find_regions(model, matches)
    for region in regions:
        check_heads(region, axis)
    is_open = any(inside.certainty != "declared" for region in regions for inside in region.insides)
    is_complete = shipped is not None and not is_open
    return Reading(matches, regions, is_complete, plan is not None, notes)


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that ``pypar.parallelize(model, mesh)`` would take: patterns of module names to styles.

    A start for a plan of one's own, in which the first pattern that fits counts:

        {"*.mlp.*": "whole", **plan_of(model)}

    ValueError as `parallelize` for a model without a plan.
    """
    return {listed([match.name]): match.style for match in read_plan(model, None, Axis.single("tp")).matches}


def _find(model: nn.Module, plan: Mapping[str, str]) -> list[Match]:
    for pattern, style in plan.items():
        if style not in STYLES:
            near = difflib.get_close_matches(str(style), STYLES, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"use one of {', '.join(STYLES)}"
            raise ValueError(f"the plan gives {pattern!r} the unknown style {style!r}; {hint}")
    matches = []
    for match in _named(model):
        style = next((style for pattern, style in plan.items() if _fits(match.name, pattern)), "whole")
        if style != "whole" and _takes(match, style):
            matches.append(match._replace(style=style))
    return matches


def _named(model: nn.Module) -> Iterator[Match]:
    """All modules without children, and parameters that stand beside a module's children, such as sinks."""
    for name, module in model.named_modules():
        if name and (not module._modules or isinstance(module, (nn.Linear, nn.Embedding))):
            yield Match(name, module, "whole")
        elif name:
            yield from (
                Match(f"{name}.{own}", module, "whole", own)
                for own, p in module._parameters.items()
                if p is not None
            )


def _takes(match: Match, style: str) -> bool:
    """Whether a style is meant for such a thing at all: names of layers are also names of experts' 3-D weights."""
    if style in ("whole", "per_head"):
        return True
    if match.parameter is not None:
        return style == "column" and getattr(match.module, match.parameter).dim() <= 2
    return isinstance(match.module, (nn.Linear, nn.Embedding))


def _fits(name: str, pattern: str) -> bool:
    """fnmatch on the whole module name; "*.x" also means an x at the top."""
    return fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern)


def _check_found(model: nn.Module, matches: list[Match], plan: Mapping[str, str]) -> None:
    seen = _seen(model)
    if not plan:
        raise ValueError(f"the plan is empty; {seen}. Give None for the usual names")
    for pattern, style in plan.items():
        names = [m.name for m in _named(model) if _takes(m, style)]
        # What starts from the usual plan has names of other models too.
        if USUAL_PLAN.get(pattern) == style or any(_fits(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(
            pattern.rpartition(".")[2], [n.rpartition(".")[2] for n in names], n=1
        )
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"the plan's pattern {pattern!r} matches no module; {hint}In this model {seen}")
    if not matches:
        raise ValueError(f"the plan cuts nothing of this {type(model).__name__}; {seen}")


def _seen(model: nn.Module) -> str:
    kinds = (nn.Linear, nn.Embedding)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return (
        f"its linear layers and embeddings are called {listed(names)}" if names else "it has no linear layer"
    )


def _understood(
    model: nn.Module, matches: list[Match], axis: Axis, notes: list[str], *, may_be_halves: bool
) -> list[Match]:
    """The matches of a plan that nobody gave, without what is left whole, of which ``notes`` get a sentence each."""
    dropped = left_whole(model, matches, axis, may_be_halves=may_be_halves)
    kept = [match for match in matches if match.name not in dropped]
    if not any(m.style in ("column", "row", "row_split") for m in kept):
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
