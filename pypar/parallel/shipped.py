"""The tensor-parallel plan that a model of Hugging Face transformers brings along, in pypar's roles.

transformers keeps it as `config.base_model_tp_plan` and in each model's `_tp_plan`, from its version 4.48 on: names
of modules and of bare parameters, in which "*" is a layer's number, to names of styles. pypar reads both; nothing
of transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from pypar.parallel.regions import cuts_layers
from pypar.role import WHOLE, Match
from pypar.tensor_parallel.shipped_styles import EXPERTS, STYLES, role_of_style


def shipped_matches(model: nn.Module) -> list[Match] | None:
    """What the model's own plan cuts; None where it has none, or one that cuts nothing but experts.

    ValueError for a style that pypar does not have.
    """
    styles = _styles_by_name(model)
    modules = dict(model.named_modules())
    experts = [name for name, style in styles.items() if style in EXPERTS]
    whole = {name if name in modules else name.rpartition(".")[0] for name in experts}
    matches = []
    for name, style in styles.items():
        if style in EXPERTS or any(name.startswith(f"{block}.") for block in whole):
            continue
        if style not in STYLES:
            raise ValueError(
                f"the plan that transformers ships for this {type(model).__name__} gives {name} the style "
                f"{style!r}, for which pypar has no role; give a plan of your own, which may start from "
                "pypar.parallel.USUAL_PLAN"
            )
        owner, _, last = name.rpartition(".")
        module = modules.get(name)
        if module is None:
            matches.append(Match(name, modules[owner], role_of_style(style), last))
        else:
            matches.append(Match(name, module, role_of_style(style, module)))
    matches = [match for match in matches if match.role != WHOLE]
    return matches if any(map(cuts_layers, matches)) else None


def _styles_by_name(model: nn.Module) -> dict[str, str]:
    """The shipped style of each module and parameter that has one."""
    plans = dict(_plans(model))
    styles = {}
    names = [name for name, _ in model.named_modules() if name] + [
        name for name, _ in model.named_parameters()
    ]
    for name in names:
        for prefix, plan in plans.items():  # outermost first
            if name.startswith(prefix) and (style := plan.get(_folded(name[len(prefix) :]))) is not None:
                styles[name] = style
                break
    return styles


def _plans(model: nn.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """(prefix of names, plan) of each module that has one."""
    for name, module in model.named_modules():
        plan: dict[str, Any] = dict(getattr(module, "_tp_plan", None) or {})
        if getattr(module, "base_model", None) is module:
            plan = dict(getattr(getattr(module, "config", None), "base_model_tp_plan", None) or {}) | plan
        if plan:
            yield (f"{name}." if name else ""), plan


def _folded(name: str) -> str:
    """The name with the numbers of layers as "*"; digits inside a word (w1, fc2) stay."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
