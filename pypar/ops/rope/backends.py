"""rope by the native kernel, by Triton and by the definition, into new tensors or in place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.rope.definition import (
    Turned,
    check_rows,
    reference_backward,
    reference_forward,
    reference_in_place,
)
from pypar.ops.rows import native_refusal

_LARGEST_TRITON_HEAD = 2048  # LARGEST_HEAD of kernels/rope.py, which only a machine with Triton can import


def _into_new(turn: Callable[..., None], direction: float, q: Tensor, k: Tensor | None, *how: Any) -> Turned:
    """What `turn` makes of q and k. how: cos, sin, positions, interleaved."""
    q_out = q.new_empty(q.shape)
    k_out = q.new_empty((0,) if k is None else k.shape)
    turn(_adjacent(q), None if k is None else _adjacent(k), q_out, k_out, *how, direction)
    return q_out, k_out


def _in_place(turn: Callable[..., None], q: Tensor, k: Tensor | None, *how: Any) -> None:
    """Lets `turn` write over q and k, or over copies where the features of a head are not adjacent."""
    places = _adjacent(q), None if k is None else _adjacent(k)
    turn(*places, *places, *how, 1.0)
    for x, place in zip((q, k), places, strict=True):
        if x is not None and place is not None and place is not x:
            x.copy_(place)


def _adjacent(x: Tensor) -> Tensor:
    """x, the features of whose heads are adjacent; a copy where they are not."""
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


def _native_turn(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    direction: float,
) -> None:
    """q_out = q turned, and k_out = k turned where there is one."""
    if positions is not None:
        check_rows(positions, len(cos))
        positions = positions.expand(q.shape[:2]).contiguous()
    table_stride = 0 if cos.dim() == 2 else cos.shape[1]  # rows from a sequence's to the next one's
    native.run(
        native.module().rope,
        _heads(q, q_out), None if k is None or k_out is None else _heads(k, k_out),
        cos.float().contiguous(), sin.float().contiguous(), 0 if positions is None else positions,
        q.shape[0], q.shape[1], q.shape[3], cos.shape[-1], table_stride, interleaved, direction,
        native.dtype_code(q), native.num_threads(),
    )  # fmt: skip


def _heads(x: Tensor, out: Tensor) -> tuple[Any, ...]:
    return x, out, x.shape[2], x.stride()[:3], out.stride()[:3]


def _triton_turn(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    direction: float,
) -> None:
    if positions is not None:
        check_rows(positions, len(cos))
        positions = positions.expand(q.shape[:2])
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    kernels = importlib.import_module("pypar.kernels.rope")
    kernels.turn(q, k, q_out, k_out, cos, sin, positions, interleaved, direction)


def _native_unsupported(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> str | None:
    return native_refusal(q, *(x for x in (k, cos, sin, positions) if x is not None))


def _triton_unsupported(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> str | None:
    if q.shape[-1] > _LARGEST_TRITON_HEAD:
        return f"a head has {q.shape[-1]} features, and {_LARGEST_TRITON_HEAD} fit a program's registers"
    return triton_refusal(q, k, cos, sin, positions)


BACKENDS = (
    Backend(
        "native",
        partial(_into_new, _native_turn, 1.0),
        partial(_into_new, _native_turn, -1.0),
        _native_unsupported,
    ),
    Backend(
        "triton",
        partial(_into_new, _triton_turn, 1.0),
        partial(_into_new, _triton_turn, -1.0),
        _triton_unsupported,
    ),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)
IN_PLACE: dict[str, Callable[..., None]] = {  # by the name of a backend
    "native": partial(_in_place, _native_turn),
    "triton": partial(_in_place, _triton_turn),
    "reference": reference_in_place,
}
