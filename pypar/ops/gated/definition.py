"""The definition of gated activations: activation(gate) * up, where a Gate says which, and where gate and up are.

forward(given) gives out; backward(dout, given) gives (dgate, dup). Where up is None, `gate` holds both, `dgate` has the
gradients of both in the same places, and `dup` is empty.
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


@dataclass(frozen=True)
class GatedInputs:
    """What forward takes; see `swiglu`. The operator pypar::gated_forward takes gate, up and the fields of `how`."""

    gate: Tensor
    up: Tensor | None
    how: Gate

    @property
    def out_shape(self) -> torch.Size:
        if self.up is not None:
            return self.gate.shape
        return torch.Size((*self.gate.shape[:-1], self.gate.shape[-1] // 2))

    def wide(self) -> tuple[Tensor, Tensor]:
        """gate and up in the dtype of computing."""
        gate, up = operands(self.gate, self.up, self.how.interleaved)
        return gate.to(accumulate_dtype(gate)), up.to(accumulate_dtype(gate))


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


def activated(gate: Tensor, how: Gate) -> tuple[Tensor, Tensor]:
    """(activation(gate), its derivative)."""
    activation, alpha, limit, _ = how.fields
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


def reference_forward(given: GatedInputs) -> Tensor:
    """activation(gate) * up; the clamped one is multiplied with 1 + up, where up is within [-limit, limit]."""
    g, u = given.wide()
    if given.how.activation == "clamped_silu":
        u = u.clamp(-given.how.limit, given.how.limit) + 1
    return (activated(g, given.how)[0] * u).to(given.gate.dtype).contiguous()


def reference_backward(dout: Tensor, given: GatedInputs) -> tuple[Tensor, Tensor]:
    """dgate = dout * up * activation'(gate) and dup = dout * activation(gate)."""
    gate, how = given.gate, given.how
    g, u = given.wide()
    value, slope = activated(g, how)
    is_clamped = how.activation == "clamped_silu"
    factor = u.clamp(-how.limit, how.limit) + 1 if is_clamped else u
    dgate, dup = dout.to(g.dtype) * factor * slope, dout.to(g.dtype) * value
    if is_clamped:
        dup = torch.where(u.abs() <= how.limit, dup, 0)
    if given.up is not None:
        return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
    both = torch.stack((dgate, dup), -1).flatten(-2) if how.interleaved else torch.cat((dgate, dup), -1)
    return both.to(gate.dtype).contiguous(), gate.new_empty(0)
