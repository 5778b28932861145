"""Gated activations of feed-forward blocks: activation(gate) * up (Shazeer, arXiv 2002.05202).

gate and up are two tensors [..., F] of one dtype and any strides; or one tensor [..., 2F], passed as `gate` alone, that
holds the gate in its first half and up in its second (Phi-3) or, if interleaved, both in turn (GPT-OSS). The result
[..., F] of that dtype is contiguous, computed in fp32 and rounded once. Backward reads the inputs alone and computes
the activation again; the gradient of one tensor is one tensor, written once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.gated.backends import BACKENDS
from pypar.ops.gated.definition import Gate, check
from pypar.ops.register import register, register_gradient

__all__ = ["BACKENDS", "clamped_swiglu", "geglu", "swiglu"]


def swiglu(
    gate: Tensor, up: Tensor | None = None, *, interleaved: bool = False, backend: str | None = None
) -> Tensor:
    """gate * sigmoid(gate) * up, as in Llama.

    gate, up: [..., F], any strides; or gate: [..., 2F], which holds both, as halves or, if interleaved, in turn.
    Returns [..., F], contiguous. Computed in fp32 and rounded once. ValueError: operands that do not fit together, a
    backend that refuses.
    """
    return _gated(gate, up, Gate("silu", interleaved=interleaved), backend)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "none",
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """gelu(gate) * up, with operands as `swiglu` takes them.

    approximate: as torch.nn.functional.gelu's, "none" for gate * P(z <= gate) of a standard normal z, or "tanh" for
    gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2, which Gemma uses. ValueError: another word, and as
    swiglu.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r} and must be 'none' or 'tanh'")
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return _gated(gate, up, Gate(activation, interleaved=interleaved), backend)


def clamped_swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """g * sigmoid(alpha * g) * (u + 1), with g = min(gate, limit) and u = up within [-limit, limit], as in GPT-OSS.

    Operands are as `swiglu` takes them; GPT-OSS has them interleaved. No gradient flows to what is cut off. ValueError:
    a limit that is not positive, and as swiglu.
    """
    if not limit > 0:
        raise ValueError(f"limit ({limit}) must be positive, or nothing of up is left; GPT-OSS has 7.0")
    return _gated(gate, up, Gate("clamped_silu", alpha, limit, interleaved), backend)


def _gated(gate: Tensor, up: Tensor | None, how: Gate, backend: str | None) -> Tensor:
    check(gate, up, how)
    chosen = choose("gated", BACKENDS, {"gate": gate, "up": up}, backend)
    return _forward(gate, up, *how.fields, chosen.name)


def _fake_forward(gate: Tensor, up: Tensor | None, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_backward(dout: Tensor, gate: Tensor, up: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, *ctx.how = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = _backward(dout, gate, up, *ctx.how)
    return dgate, None if up is None else dup, *[None] * len(ctx.how)


_HOW = "str activation, float alpha, float limit, bool interleaved, str backend"
_forward = register(
    "gated", "forward", f"(Tensor gate, Tensor? up, {_HOW}) -> Tensor", BACKENDS, _fake_forward
)
_backward = register(
    "gated",
    "backward",
    f"(Tensor dout, Tensor gate, Tensor? up, {_HOW}) -> (Tensor, Tensor)",
    BACKENDS,
    _fake_backward,
)
register_gradient("gated", _gradient, _save)
