"""Gated feed-forward blocks of transformers, whose activation and product become one operator.

The linear layers stay what they are, and are called as ever: the model's own, or what adapters, quantisation or
`pypar.parallelize` have put in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pypar.hugging_face.fused.recognition import (
    Swap,
    Verdict,
    covered,
    device_of,
    difference,
    fused_class,
    is_same,
    known,
    numbers,
    stand_in,
)
from pypar.ops.gated import clamped_swiglu, geglu, swiglu

_WIDTH = 8  # of the rows of a trial


@dataclass(frozen=True)
class Gated:
    """Makes the members of a class that computes a gated activation by one operator.

    layout: one of _LAYOUTS, where gate and up are. activation: one of _OPERATORS.
    """

    layout: str
    activation: str

    def __call__(self, original: Any) -> Mapping[str, Any]:
        return _LAYOUTS[self.layout](_OPERATORS[self.activation])


Operator = Callable[..., Tensor]
_OPERATORS: dict[str, Operator] = {
    "pypar.swiglu": swiglu,
    "pypar.geglu": geglu,
    "pypar.geglu by tanh": functools.partial(geglu, approximate="tanh"),
    "pypar.clamped_swiglu": clamped_swiglu,
}


def _of_two(operator: Operator) -> Mapping[str, Any]:
    """down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(operator(self.gate_proj(x), self.up_proj(x)))

    return {"forward": forward}


def _of_halves(operator: Operator) -> Mapping[str, Any]:
    """One linear gives gate and up, the gate first."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.down_proj(operator(self.gate_up_proj(hidden_states)))

    return {"forward": forward}


def _of_experts(operator: Operator) -> Mapping[str, Any]:
    """The rows of all experts at once, with gate and up as halves, between their grouped products."""

    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        return operator(gate_up_out)

    return {"_apply_gate": _apply_gate}


def _of_clamped_experts(operator: Operator) -> Mapping[str, Any]:
    """The same with gate and up in turn, and bounds of the module's own."""

    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        return operator(gate_up, alpha=self.alpha, limit=self.limit, interleaved=True)

    return {"_apply_gate": _apply_gate}


_LAYOUTS = {
    "two": _of_two,
    "halves": _of_halves,
    "experts": _of_experts,
    "clamped experts": _of_clamped_experts,
}


def gate_verdict(module: nn.Module) -> Verdict | None:
    """None where the module is no gated block that pypar knows."""
    forward, gate = type(module).forward, getattr(type(module), "_apply_gate", None)
    if is_same(forward, known("llama.LlamaMLP.forward")):
        return _verdict(module, "two", module.act_fn, {"gate_proj": _Part(0), "up_proj": _Part(1)})
    if is_same(forward, known("phi3.Phi3MLP.forward")):
        return _verdict(module, "halves", module.activation_fn, {"gate_up_proj": nn.Identity()})
    if is_same(gate, known("gpt_oss.GptOssExperts._apply_gate")):
        return _trial(module, Gated("clamped experts", "pypar.clamped_swiglu"), {}, "_apply_gate")
    if is_same(gate, known("mixtral.MixtralExperts._apply_gate")):
        verdict = _verdict(module, "experts", module.act_fn, {}, "_apply_gate")
        chosen: Any = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen == "eager" and not verdict.reason:
            reason = (
                'experts_implementation="eager" computes expert by expert with an activation of its own; '
                'model.set_experts_implementation("grouped_mm") has one for all'
            )
            return Verdict(verdict.swap, reason)
        return verdict
    return None


def _verdict(
    module: nn.Module,
    layout: str,
    activation: Any,
    children: Mapping[str, nn.Module],
    function: str = "forward",
) -> Verdict:
    operator = _operator_of(activation)
    if operator is None:
        reason = f"pypar has no gated {type(activation).__name__}"
        return Verdict(_swap(Gated(layout, "pypar.swiglu")), reason)
    children = {"act_fn": activation, "activation_fn": activation, **children}
    return _trial(module, Gated(layout, operator), children, function)


def _trial(module: nn.Module, make: Gated, children: Mapping[str, nn.Module], function: str) -> Verdict:
    swap, children = _swap(make), {"down_proj": nn.Identity(), **children}

    def of(cls: type) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(cls, function)(stand_in(module, {}, children), x)

    x = 4 * numbers(
        3, 2 * _WIDTH, seed=0, device=device_of(module)
    )  # some are beyond the bounds of clamped gates
    return Verdict(
        swap, covered(module) or difference(of(type(module)), of(fused_class(type(module), swap)), x)
    )


def _swap(make: Gated) -> Swap:
    return Swap("gated activation", make.activation, make)


class _Part(nn.Module):
    """In a trial, a linear layer that gives one half of its input."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[self.place]


def _operator_of(activation: Any) -> str | None:
    """By the class of an activation, of which a trial then says whether it is set up as it usually is."""
    from transformers import activations

    names = {
        "SiLUActivation": "pypar.swiglu",
        "GELUActivation": "pypar.geglu",
        "GELUTanh": "pypar.geglu by tanh",
        "NewGELUActivation": "pypar.geglu by tanh",
    }
    known_classes = {getattr(activations, name, None): operator for name, operator in names.items()}
    return {nn.SiLU: "pypar.swiglu", **known_classes}.get(type(activation))
