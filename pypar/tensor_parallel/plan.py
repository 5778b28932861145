"""Which modules of a ready model are cut over tp, and how. What can be refused is refused here, before a
swap."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from pypar.mesh import Axis
from pypar.tensor_parallel.sharded import ShardedModule, part_length

USUAL_PLAN = {
    "*.q_proj": "column",
    "*.k_proj": "column",
    "*.v_proj": "column",
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
STYLES = {"column": nn.Linear, "row": nn.Linear, "column_gather": nn.Linear, "vocab": nn.Embedding}
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


class Match(NamedTuple):
    """One module to swap."""

    name: str
    module: nn.Module
    style: str


class Region(NamedTuple):
    """A module with column-parallel and row-parallel children; in between each rank has its own features.

    insides are the parameters beside the cut layers, with their names; width is the number of features of the
    column-parallel children's input, which is the same on every rank.
    """

    name: str
    module: nn.Module
    insides: tuple[tuple[str, nn.Parameter], ...]
    width: int

    def is_per_head(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter beside the cut layers works on each head, of which a rank has a part."""
        head_size = head_size_of(self.module)
        return tuple(parameter.shape) == (head_size,) and head_size != self.width


def read_plan(
    model: nn.Module, plan: Mapping[str, str] | None, axis: Axis
) -> tuple[list[Match], list[Region]]:
    """The modules that ``plan`` (None: `USUAL_PLAN`) names, and the regions that they make.

    ValueError, by a sentence, for a plan that is not clear, finds nothing, or cannot be carried out on this
    axis.
    """
    matches = _find(model, USUAL_PLAN if plan is None else plan)
    _check_found(model, matches, plan)
    for match in matches:
        _check_module(match, axis)
    _check_tied(model, matches)
    regions = list(_regions(model, matches, is_usual=plan is None))
    for region in regions:
        _check_heads(region, axis)
    return matches, regions


def head_counts(module: nn.Module) -> dict[str, int]:
    """The numbers of heads that an attention module keeps as its own attributes."""
    return {name: value for name in HEAD_COUNTS if type(value := vars(module).get(name)) is int}


def head_size_of(module: nn.Module) -> int | None:
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if type(size) is int), None)


def _find(model: nn.Module, plan: Mapping[str, str]) -> list[Match]:
    for pattern, style in plan.items():
        if style not in STYLES:
            near = difflib.get_close_matches(str(style), STYLES, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"use one of {', '.join(STYLES)}"
            raise ValueError(f"the plan gives {pattern!r} the unknown style {style!r}; {hint}")
    matches = []
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.Linear, nn.Embedding)):
            styles = [style for pattern, style in plan.items() if _fits(name, pattern)]
            if styles:
                matches.append(Match(name, module, styles[0]))
    return matches


def _fits(name: str, pattern: str) -> bool:
    """fnmatch on the whole module name; "*.x" also means an x at the top."""
    return fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern)


def _check_found(model: nn.Module, matches: list[Match], plan: Mapping[str, str] | None) -> None:
    kinds = (nn.Linear, nn.Embedding)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    seen = f"its linear layers and embeddings are called {_listed(names)}" if names else "it has none"
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ValueError(
            "the model has tensor-parallel layers already; call parallelize once, on the whole model"
        )
    if plan is not None and not plan:
        raise ValueError(f"the plan is empty; {seen}. Give None for the usual names")
    if plan is None and not any(m.style in ("column", "row") for m in matches):
        raise ValueError(
            f"parallelize knows no nn.Linear of this {type(model).__name__}'s layers by its name; {seen}. "
            'Give a plan such as {"*.up": "column", "*.down": "row"}'
        )
    for pattern in plan or ():
        if not any(_fits(name, pattern) for name in names):
            near = difflib.get_close_matches(
                pattern.rpartition(".")[2], [n.rpartition(".")[2] for n in names], n=1
            )
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"the plan's pattern {pattern!r} matches no module; {hint}In this model {seen}")


def _check_module(match: Match, axis: Axis) -> None:
    name, module, style = match
    kind = STYLES[style]
    if not isinstance(module, kind):
        others = ", ".join(s for s, k in STYLES.items() if isinstance(module, k))
        raise ValueError(
            f"{name} is a {type(module).__name__}, which cannot be {style!r}; use one of: {others}"
        )
    if type(module) is not kind:
        raise ValueError(
            f"{name} is a {type(module).__name__}, which may compute more than nn.{kind.__name__}; leave it "
            "(and what is tied to it) out of the plan, which may start from pypar.tensor_parallel.USUAL_PLAN"
        )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise ValueError(
            f"{name} has hooks, which its replacement would lose; register them after parallelize"
        )
    if isinstance(module, nn.Embedding):
        extras = ("max_norm", "scale_grad_by_freq", "sparse")
        if any(getattr(module, extra) for extra in extras):
            raise ValueError(
                f"{name} uses one of {', '.join(extras)}, which a cut embedding lacks; leave it out of the "
                "plan"
            )
        part_length(f"num_embeddings of {name}", module.num_embeddings, axis)
    elif isinstance(module, nn.Linear):
        side = "in_features" if style == "row" else "out_features"
        part_length(f"{side} of {name}", getattr(module, side), axis)


def _check_tied(model: nn.Module, matches: list[Match]) -> None:
    """One weight in several places must be cut in one way in all of them."""
    dim_of = {"column": 0, "column_gather": 0, "vocab": 0, "row": 1}
    dims = {id(m.module): dim_of[m.style] for m in matches}
    cut = {id(m.module.weight): m for m in matches}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            match = cut.get(id(parameter))
            if match is not None and dims.get(id(module)) != dim_of[match.style]:
                raise ValueError(
                    f"{name} and {match.name} share one weight, but the plan would cut only one of them, or "
                    "each along another dimension; give both, as an embedding 'vocab' and a head "
                    "'column_gather', or neither"
                )


def _regions(model: nn.Module, matches: list[Match], is_usual: bool) -> Iterator[Region]:
    by_parent: dict[str, list[Match]] = {}
    for match in matches:
        by_parent.setdefault(match.name.rpartition(".")[0], []).append(match)
    for name, members in by_parent.items():
        styles = {m.style for m in members}
        if is_usual and not styles <= {"vocab", "column_gather"}:
            _check_usual(name, model.get_submodule(name), members)
        if {"column", "row"} <= styles:
            region = _region(name, model.get_submodule(name), members)
            if is_usual:
                _check_insides(region)
            yield region


def _region(name: str, module: nn.Module, members: list[Match]) -> Region:
    cut = {id(m.module) for m in members}
    insides = list(module.named_parameters(name, recurse=False))
    for child_name, child in module.named_children():
        if not any(id(inner) in cut for inner in child.modules()):
            insides += child.named_parameters(f"{name}.{child_name}" if name else child_name)
    column = next(m.module for m in members if m.style == "column")
    assert isinstance(column, nn.Linear)
    return Region(name, module, tuple(insides), column.in_features)


def _check_usual(name: str, module: nn.Module, members: list[Match]) -> None:
    """Without the user's word, a module is only cut when all of it is understood."""
    known = {id(m.module) for m in members}
    linears = [n for n, child in module.named_children() if isinstance(child, nn.Linear)]
    unknown = [n for n in linears if id(getattr(module, n)) not in known]
    if unknown or not {"column", "row"} <= {m.style for m in members}:
        found = ", ".join(f"{m.name.rpartition('.')[2]} ({m.style})" for m in members)
        rest = f"does not know {_listed(unknown)}" if unknown else "finds no pair of column and row"
        raise ValueError(
            f"parallelize knows {found} in {name or 'the model'} but {rest}; give a plan that names every "
            "linear layer to be cut"
        )


def _check_insides(region: Region) -> None:
    """Other weights between column and row would get gradients of this rank's features only."""
    for name, parameter in region.insides:
        if tuple(parameter.shape) != (region.width,) and not region.is_per_head(parameter):
            raise ValueError(
                f"parallelize does not know {name} {tuple(parameter.shape)}, which stands beside layers that "
                "it cuts; give a plan, and sum that parameter's gradient over mesh.tp where it works on a "
                "part of the features"
            )


def _check_heads(region: Region, axis: Axis) -> None:
    counts, module = head_counts(region.module), region.module
    is_attention = head_size_of(module) is not None or "attention" in type(module).__name__.lower()
    if not counts and is_attention:
        config = getattr(module, "config", None)
        counts = {n: value for n in CONFIG_HEAD_COUNTS if type(value := getattr(config, n, None)) is int}
    for name, count in counts.items():
        if count % axis.size:
            divisor = math.gcd(*counts.values())
            divisors = " or ".join(str(d) for d in range(1, divisor + 1) if divisor % d == 0)
            raise ValueError(
                f"{name} ({count}) of {region.name} must divide by the tp size ({axis.size}); use a tp size "
                f"of {divisors}"
            )


def _listed(names: list[str]) -> str:
    """Names with numbered layers folded into one: layers.*.q_proj."""
    folded = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    shown = list(folded)[:20]
    return ", ".join(shown) + (f" and {len(folded) - 20} more" if len(folded) > 20 else "")
