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
    RopeInputs,
    Turned,
    check_rows,
    reference_backward,
    reference_forward,
    reference_in_place,
)
from pypar.ops.rows import native_refusal

Turn = Callable[[RopeInputs, Tensor, Tensor | None, float], None]

_LARGEST_TRITON_HEAD = 2048  # LARGEST_HEAD of kernels/rope.py, which only a machine with Triton can import


def _into_new(turn: Turn, direction: float, given: RopeInputs) -> Turned:
    """What `turn` makes of q and k, in new tensors."""
    q_out = given.q.new_empty(given.q.shape)
    k_out = given.q.new_empty((0,) if given.k is None else given.k.shape)
    turn(_adjacent(given), q_out, k_out, direction)
    return q_out, k_out


def _in_place(turn: Turn, given: RopeInputs) -> None:
    """Lets `turn` write over q and k, or over copies where the features of a head are not adjacent."""
    places = _adjacent(given)
    turn(places, places.q, places.k, 1.0)
    for x, place in ((given.q, places.q), (given.k, places.k)):
        if x is not None and place is not None and place is not x:
            x.copy_(place)


def _adjacent(given: RopeInputs) -> RopeInputs:
    """The same with q and k, or copies, whose heads have adjacent features."""

    def adjacent(x: Tensor) -> Tensor:
        return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()

    return given._replace(q=adjacent(given.q), k=None if given.k is None else adjacent(given.k))


def _prepared(given: RopeInputs) -> RopeInputs:
    """The same with tables and positions as kernels read them: fp32, contiguous, one position for each row of q."""
    positions = given.positions
    if positions is not None:
        check_rows(positions, len(given.cos))
        positions = positions.expand(given.q.shape[:2])
    cos, sin = given.cos.float().contiguous(), given.sin.float().contiguous()
    return given._replace(cos=cos, sin=sin, positions=positions)


def _native_turn(given: RopeInputs, q_out: Tensor, k_out: Tensor | None, direction: float) -> None:
    """q_out = q turned, and k_out = k turned where there is one."""
    q, k, cos, sin, positions, interleaved = _prepared(given)
    table_stride = 0 if cos.dim() == 2 else cos.shape[1]  # rows from a sequence's to the next one's
    native.run(
        native.module().rope,
        _heads(q, q_out), None if k is None or k_out is None else _heads(k, k_out),
        cos, sin, 0 if positions is None else positions.contiguous(),
        q.shape[0], q.shape[1], q.shape[3], cos.shape[-1], table_stride, interleaved, direction,
        native.dtype_code(q), native.num_threads(),
    )  # fmt: skip


def _heads(x: Tensor, out: Tensor) -> tuple[Any, ...]:
    return x, out, x.shape[2], x.stride()[:3], out.stride()[:3]


def _triton_turn(given: RopeInputs, q_out: Tensor, k_out: Tensor | None, direction: float) -> None:
    kernels = importlib.import_module("pypar.kernels.rope")
    kernels.turn(_prepared(given), q_out, k_out, direction)


def _native_unsupported(q: Tensor, **others: Tensor | None) -> str | None:
    return native_refusal(q, *(x for x in others.values() if x is not None))


def _triton_unsupported(q: Tensor, **others: Tensor | None) -> str | None:
    if q.shape[-1] > _LARGEST_TRITON_HEAD:
        return f"a head has {q.shape[-1]} features, and {_LARGEST_TRITON_HEAD} fit a program's registers"
    return triton_refusal(q, *others.values())


def _of_record(function: Callable[[RopeInputs], Any]) -> Callable[..., Any]:
    """The function of a record as one of the record's fields, which operators pass."""
    return lambda *fields: function(RopeInputs(*fields))


BACKENDS = (
    *(
        Backend(
            name,
            _of_record(partial(_into_new, turn, 1.0)),
            _of_record(partial(_into_new, turn, -1.0)),
            unsupported,
        )
        for name, turn, unsupported in (
            ("native", _native_turn, _native_unsupported),
            ("triton", _triton_turn, _triton_unsupported),
        )
    ),
    Backend("reference", _of_record(reference_forward), _of_record(reference_backward), never_refuses),
)
IN_PLACE: dict[str, Callable[..., None]] = {  # by the name of a backend
    "native": _of_record(partial(_in_place, _native_turn)),
    "triton": _of_record(partial(_in_place, _triton_turn)),
    "reference": _of_record(reference_in_place),
}
