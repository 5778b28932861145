"""The definition of gated activations: activation(gate) * up, where a Gate says which, and where gate and up are.

forward(gate, up, *how) gives out; backward(dout, gate, up, *how) gives (dgate, dup). Where up is None, `gate` holds
both, `dgate` has the gradients of both in the same places, and `dup` is empty. `how` is a Gate's fields.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")


@dataclass(frozen=True)
class Gate:
    """activation: one of ACTIVATIONS. alpha, limit: of "clamped_silu". interleaved: in one tensor, gate and up take
    turns; otherwise its first half is the gate."""

    activation: str
    alpha: float = 0.0
    limit: float = 0.0
    interleaved: bool = False

    @property
    def fields(self) -> tuple[str, float, float, bool]:
        return astuple(self)


def check(gate: Tensor, up: Tensor | None, how: Gate) -> None:
    """ValueError for operands that do not fit together."""
    if gate.dim() < 1:
        raise ValueError("gate has no dimension; pass [..., F], or [..., 2F] with gate and up in it")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(
            f"without up, gate {tuple(gate.shape)} holds gate and up and must be [..., 2F], with an even last "
            f"dimension; pass both in it, or pass up"
        )
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(
            f"up {tuple(up.shape)} {up.dtype} must match gate {tuple(gate.shape)} {gate.dtype}; broadcast or convert "
            f"it first"
        )
    if up is not None and how.interleaved:
        raise ValueError(
            "interleaved=True is for gate and up in one tensor; pass that alone, or leave it out"
        )


def operands(gate: Tensor, up: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up, wherever they are."""
    if up is not None:
        return gate, up
    if interleaved:
        return gate[..., ::2], gate[..., 1::2]
    F = gate.shape[-1] // 2
    return gate[..., :F], gate[..., F:]


def activated(gate: Tensor, activation: str, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    """(activation(gate), its derivative)."""
    if activation == "gelu":
        below = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return gate * below, below + gate * density
    if activation == "gelu_tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = gate.square().clamp(max=1e4)  # beyond, tanh is 1, and its slope not inf * 0
        tanh = torch.tanh(scale * gate * (1 + cubic * square))
        slope = 0.5 * (1 - tanh.square()) * scale * (1 + 3 * cubic * square)
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + gate * slope
    if activation == "clamped_silu":
        bounded = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(alpha * bounded)
        slope = sigmoid * (1 + alpha * bounded * (1 - sigmoid))
        return bounded * sigmoid, torch.where(gate <= limit, slope, 0)
    sigmoid = torch.sigmoid(gate)
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


def reference_forward(
    gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    """activation(gate) * up; the clamped one is multiplied with 1 + up, where up is within [-limit, limit]."""
    wide = accumulate_dtype(gate)
    g, u = (x.to(wide) for x in operands(gate, up, interleaved))
    if activation == "clamped_silu":
        u = u.clamp(-limit, limit) + 1
    return (activated(g, activation, alpha, limit)[0] * u).to(gate.dtype).contiguous()


def reference_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """dgate = dout * up * activation'(gate) and dup = dout * activation(gate)."""
    wide = accumulate_dtype(gate)
    g, u = (x.to(wide) for x in operands(gate, up, interleaved))
    value, slope = activated(g, activation, alpha, limit)
    factor = u.clamp(-limit, limit) + 1 if activation == "clamped_silu" else u
    dgate, dup = dout.to(wide) * factor * slope, dout.to(wide) * value
    if activation == "clamped_silu":
        dup = torch.where(u.abs() <= limit, dup, 0)
    if up is not None:
        return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
    both = torch.stack((dgate, dup), -1).flatten(-2) if interleaved else torch.cat((dgate, dup), -1)
    return both.to(gate.dtype).contiguous(), gate.new_empty(0)
