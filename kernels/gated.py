"""Gated activations in Triton: activation(gate) * up, element by element of rows."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run_launches
from .rows import load_rows, row_tile, store_rows

_LARGEST_BLOCK = 1024  # columns of a program; longer rows are cut


def gated_forward(gate: Tensor, up: Tensor, how: Any) -> Tensor:
    """activation(gate) * up of rows [R, F] whose elements are adjacent, by a Gate of pypar.ops.gated (read here, not
    imported); if interleaved, gate [R, 2F] holds both."""
    out = gate.new_empty(gate.shape[0], gate.shape[1] // (2 if how.interleaved else 1))
    _run(_gated_forward_kernel, out, {"gate": gate, "up": up}, {"out_ptr": out}, how)
    return out


def gated_backward(
    dout: Tensor, operands: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], how: Any
) -> None:
    """Writes the gradients of gate and up, which lie like these, into `gradients`."""
    (gate, up), (dgate, dup) = operands, gradients
    tensors = {"dout": dout, "gate": gate, "up": up, "dgate": dgate, "dup": dup}
    _run(_gated_backward_kernel, dout, tensors, {}, how)


def _run(kernel: Any, like: Tensor, strided: dict[str, Tensor], dense: dict[str, Tensor], how: Any) -> None:
    """One program for each tile of `like` [R, F]."""
    R, F = like.shape
    tile = row_tile(min(F, _LARGEST_BLOCK))
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in strided.items()}
    arguments |= {f"stride_{name}": x.stride(0) for name, x in strided.items()}
    arguments |= {**dense, "R": R, "alpha": how.alpha, "limit": how.limit, "F": F}
    arguments |= {"BLOCK_ROWS": tile.BLOCK_ROWS, "BLOCK_F": tile.BLOCK_D}
    arguments |= {"ACTIVATION": how.activation, "INTERLEAVED": how.interleaved}
    programs = triton.cdiv(R, tile.BLOCK_ROWS) * triton.cdiv(F, tile.BLOCK_D)
    run_launches([Launch(kernel, programs, arguments, tile.num_warps, 1)], like)


@triton.jit(do_not_specialize=["R"])
def _gated_forward_kernel(
    gate_ptr, up_ptr, out_ptr, R, stride_gate, stride_up, alpha, limit,
    F: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(R, F, BLOCK_ROWS, BLOCK_F)
    gate, up = _load_operands(gate_ptr, up_ptr, row, stride_gate, stride_up, R, F, BLOCK_F, INTERLEAVED)
    if ACTIVATION == "clamped_silu":
        up = _within(up, limit) + 1.0
    value, _ = _activated(gate, alpha, limit, ACTIVATION)
    store_rows(out_ptr, row, F, column, inside, value * up)


@triton.jit(do_not_specialize=["R"])
def _gated_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, R, stride_dout, stride_gate, stride_up, stride_dgate, stride_dup,
    alpha, limit,
    F: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(R, F, BLOCK_ROWS, BLOCK_F)
    gate, up = _load_operands(gate_ptr, up_ptr, row, stride_gate, stride_up, R, F, BLOCK_F, INTERLEAVED)
    dout = load_rows(dout_ptr, row, stride_dout, column, inside)
    value, slope = _activated(gate, alpha, limit, ACTIVATION)
    dup = dout * value
    if ACTIVATION == "clamped_silu":
        dup = tl.where(tl.abs(up) <= limit, dup, 0.0)
        up = _within(up, limit) + 1.0
    dgate = dout * up * slope
    if INTERLEAVED:
        both = tl.reshape(tl.join(dgate, dup), (BLOCK_ROWS, 2 * BLOCK_F))
        column, inside = _pairs_place(row, R, F, BLOCK_F)
        store_rows(dgate_ptr, row, stride_dgate, column, inside, both)
    else:
        store_rows(dgate_ptr, row, stride_dgate, column, inside, dgate)
        store_rows(dup_ptr, row, stride_dup, column, inside, dup)


@triton.jit
def _place(R, F: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's rows, columns of out, and which of them exist."""
    blocks = tl.cdiv(F, BLOCK_F)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    return row, column, (row < R)[:, None] & (column < F)[None, :]


@triton.jit
def _pairs_place(row, R, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's columns of a tensor in which gate and up take turns, and which of them exist."""
    column = tl.program_id(0) % tl.cdiv(F, BLOCK_F) * 2 * BLOCK_F + tl.arange(0, 2 * BLOCK_F)
    return column, (row < R)[:, None] & (column < 2 * F)[None, :]


@triton.jit
def _load_operands(
    gate_ptr, up_ptr, row, stride_gate, stride_up, R, F: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """(gate, up) of this program's tile, in fp32."""
    if INTERLEAVED:
        column, inside = _pairs_place(row, R, F, BLOCK_F)
        both = load_rows(gate_ptr, row, stride_gate, column, inside)
        gate, up = tl.split(tl.reshape(both, (row.shape[0], BLOCK_F, 2)))
    else:
        _, column, inside = _place(R, F, row.shape[0], BLOCK_F)
        gate = load_rows(gate_ptr, row, stride_gate, column, inside)
        up = load_rows(up_ptr, row, stride_up, column, inside)
    return gate, up


@triton.jit
def _activated(gate, alpha, limit, ACTIVATION: tl.constexpr):
    """(activation(gate), its derivative)."""
    if ACTIVATION == "silu":
        share, rest = _sigmoid(gate)
        value = gate * share
        slope = share + value * rest
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        value = gate * share
        slope = share + gate * tl.exp(gate * gate * -0.5) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        square = tl.minimum(gate * gate, 1e4)  # beyond, the sigmoid is 0 or 1, and its slope not inf * 0
        share, rest = _sigmoid(gate * (1.5957691216057308 + 0.07135481627260025 * square))
        value = gate * share
        slope = share + value * rest * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        bounded = tl.where(gate > limit, limit, gate)  # unlike minimum, it keeps what is no number
        share, rest = _sigmoid(bounded * alpha)
        value = bounded * share
        slope = tl.where(gate <= limit, share + value * rest * alpha, 0.0)
    return value, slope


@triton.jit
def _within(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _sigmoid(x):
    """(1 / (1 + e^-x), one minus that), both to the last digits."""
    power = tl.exp(-tl.abs(x))
    greater = 1.0 / (1.0 + power)
    less = power * greater
    return tl.where(x < 0.0, less, greater), tl.where(x < 0.0, greater, less)
