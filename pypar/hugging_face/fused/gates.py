"""Gated feed-forward blocks of transformers, whose activation and product become one operator.

The linear layers stay what they are, and are called as ever: the model's own, or what adapters, quantisation or
`pypar.parallelize` have put in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from pypar.ops.swiglu import swiglu

_PART = "gated activation"
_WIDTH = 8  # of the rows of a trial


def _of_two(original: Any) -> Mapping[str, Any]:
    """down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return {"forward": forward}


def _of_halves(original: Any) -> Mapping[str, Any]:
    """One linear gives gate and up, the gate first."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(hidden_states).chunk(2, dim=-1)))

    return {"forward": forward}


def _of_experts(original: Any) -> Mapping[str, Any]:
    """The rows of all experts at once, with gate and up as halves, between their grouped products."""

    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        return swiglu(*gate_up_out.chunk(2, dim=-1))

    return {"_apply_gate": _apply_gate}


def gate_verdict(module: nn.Module) -> Verdict | None:
    """None where the module is no gated block that pypar knows."""
    forward = type(module).forward
    if is_same(forward, known("llama.LlamaMLP.forward")):
        return _verdict(module, _of_two, "act_fn", {"gate_proj": _Part(0), "up_proj": _Part(1)})
    if is_same(forward, known("phi3.Phi3MLP.forward")):
        return _verdict(module, _of_halves, "activation_fn", {"gate_up_proj": nn.Identity()})
    if is_same(getattr(type(module), "_apply_gate", None), known("mixtral.MixtralExperts._apply_gate")):
        verdict = _verdict(module, _of_experts, "act_fn", {}, "_apply_gate")
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
    make: Callable[[Any], Mapping[str, Any]],
    activation: str,
    children: Mapping[str, nn.Module],
    function: str = "forward",
) -> Verdict:
    act, swap = getattr(module, activation), Swap(_PART, "pypar.ops.swiglu", make)
    if not _is_silu(act):
        return Verdict(swap, f"pypar has no gated {type(act).__name__}")
    children = {activation: act, "down_proj": nn.Identity(), **children}

    def of(cls: type) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(cls, function)(stand_in(module, {}, children), x)

    x = numbers(3, 2 * _WIDTH, seed=0, device=device_of(module))
    return Verdict(
        swap, covered(module) or difference(of(type(module)), of(fused_class(type(module), swap)), x)
    )


class _Part(nn.Module):
    """In a trial, a linear layer that gives one half of its input."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[self.place]


def _is_silu(activation: Any) -> bool:
    from transformers import activations

    return type(activation) in (nn.SiLU, getattr(activations, "SiLUActivation", None))
