"""Rotary position embedding (Su et al., arXiv 2104.09864), and the tables of its angles."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from pypar.ops.backend import choose
from pypar.ops.register import define, register, register_gradient
from pypar.ops.rope.backends import BACKENDS, IN_PLACE
from pypar.ops.rope.definition import Turned, check
from pypar.ops.rope.tables import rope_frequencies, rope_tables

__all__ = ["BACKENDS", "rope", "rope_frequencies", "rope_tables"]


@overload
def rope(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: None = None,
    *,
    positions: int | Tensor | None = None,
    interleaved: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def rope(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    *,
    positions: int | Tensor | None = None,
    interleaved: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rope(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor | None = None,
    *,
    positions: int | Tensor | None = None,
    interleaved: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Turns pairs of features of q, and of k in the same pass, by the angles of their positions; computed in fp32.

    Pair i of a head is (x[i], x[i + R/2]), as in Hugging Face's Llama, or, if interleaved, (x[2i], x[2i + 1]), as in
    GPT-J. R is twice the tables' columns: features from R to H stay as they are.

    q: [B, T, N, H], k: [B, T, G, H], any strides; cos, sin: float32 (or float64 for a float64 q), of which no gradient
    is taken. positions: None where the tables are those of q's positions, [T, R/2] or [B, T, R/2]; otherwise the
    tables are [L, R/2] and it says their rows: the first position's, or int64 [T] or [B, T].
    in_place: writes into q and k, which is refused where a gradient of theirs is wanted.
    Returns what is turned of q, contiguous (q itself if in_place), or of (q, k) where k is given. ValueError: shapes
    that do not fit, positions beyond the tables (on a GPU, whose numbers nobody waits for, they give NaN), a backend
    that refuses.
    """
    check(q, k, cos, sin, positions, in_place)
    if isinstance(positions, int):
        cos, sin = (table.narrow(0, positions, q.shape[1]) for table in (cos, sin))
        positions = None
    elif cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    chosen = choose(
        "rope", BACKENDS, {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}, backend
    )
    if in_place:
        _in_place(q, k, cos, sin, positions, interleaved, chosen.name)
        return q if k is None else (q, k)
    q_out, k_out = _forward(q, k, cos, sin, positions, interleaved, chosen.name)
    return q_out if k is None else (q_out, k_out)


def _fake(q: Tensor, k: Tensor | None, *_: Any) -> Turned:
    return q.new_empty(q.shape), q.new_empty((0,) if k is None else k.shape)


def _fake_in_place(*_: Any) -> None:
    return None


def _run_in_place(*arguments: Any) -> None:
    IN_PLACE[arguments[-1]](*arguments[:-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, k, cos, sin, positions, *ctx.how = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin, positions)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    dk = dk if ctx.has_k else None
    given = [x for x in (dq, dk) if x is not None]
    turned: list[Tensor | None] = [None, None]
    if given:
        one, other = (*given, None)[:2]
        found = _backward(one, other, *ctx.saved_tensors, *ctx.how)
        turned = list(found) if len(given) == 2 else [found[0], None] if dq is not None else [None, found[0]]
    return *turned, *[None] * (3 + len(ctx.how))


_TABLES = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, str backend"
_forward = register(
    "rope", "forward", f"(Tensor q, Tensor? k, {_TABLES}) -> (Tensor, Tensor)", BACKENDS, _fake
)
_backward = register(
    "rope", "backward", f"(Tensor dq, Tensor? dk, {_TABLES}) -> (Tensor, Tensor)", BACKENDS, _fake
)
_in_place = define(
    "rope_in_place", f"(Tensor(a!) q, Tensor(b!)? k, {_TABLES}) -> ()", _run_in_place, _fake_in_place
)
register_gradient("rope", _gradient, _save)
