"""Gradients on their way into and out of what travels: scaled and converted in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.backend.gpu import dtype_refusal, triton_refusal
from pypar.ops.register import register
from pypar.ops.rows import accumulate_dtype, native_refusal
from pypar.ops.uncompiled import uncompiled

_MOVED = (torch.float32, torch.bfloat16, torch.float16)
_LARGE_BYTES = 256 << 10  # kStreamBytes in csrc/core/streaming_stores.h


def bucket(src: Tensor, scale: float = 1.0, *, out: Tensor, backend: str | None = None) -> Tensor:
    """out = src * scale, computed in fp32 and rounded once to out's dtype; returns out.

    src, out: floating-point tensors of one shape on one device, contiguous; src itself may be out. Not
    differentiable. ValueError: shapes or devices that differ, gaps between elements, a backend that refuses.
    """
    if src.shape != out.shape or src.device != out.device:
        raise ValueError(
            f"out {tuple(out.shape)} on {out.device} must have the shape and device of src {tuple(src.shape)} on "
            f"{src.device}; make it with torch.empty_like(src, dtype=...)"
        )
    if not (src.is_contiguous() and out.is_contiguous()):
        raise ValueError(
            f"src (strides {src.stride()}) and out (strides {out.stride()}) must be contiguous; flat buffers are"
        )
    chosen = choose("bucket", BACKENDS, {"src": src, "scale": scale, "out": out}, backend)
    _forward(src, scale, out, chosen.name)
    return out


@uncompiled("it writes memory past the caches")
def move(src: Tensor, out: Tensor) -> None:
    """out.copy_(src), past the caches where a large CPU tensor is only copied: nobody reads it soon."""
    is_plain = src.is_cpu and out.is_cpu and src.dtype == out.dtype and not src.is_sparse
    if (
        is_plain
        and src.nbytes >= _LARGE_BYTES
        and src.dtype in _MOVED
        and src.shape == out.shape
        and src.is_contiguous()
        and out.is_contiguous()
        and native.missing() is None
    ):
        _native_forward(src, 1.0, out)
    else:
        out.copy_(src)


@uncompiled("it writes into flat buffers")
def pack(pieces: Sequence[Tensor], flat: Tensor, scale: float = 1.0) -> None:
    """flat[...] = the elements of the pieces, one piece after the other, times scale, in flat's dtype; one pass.

    pieces: contiguous tensors of any shapes and one dtype. flat is as long or longer; the rest of it stays.
    """
    begin = 0
    for piece in pieces:
        _transfer(piece.view(-1), flat[begin : begin + piece.numel()], scale)
        begin += piece.numel()


@uncompiled("it reads flat buffers")
def unpack(flat: Tensor, pieces: Sequence[Tensor], scale: float = 1.0) -> None:
    """The inverse of `pack`: every piece = its elements of flat, times scale, in the piece's dtype; one pass."""
    begin = 0
    for piece in pieces:
        _transfer(flat[begin : begin + piece.numel()], piece.view(-1), scale)
        begin += piece.numel()


def _transfer(src: Tensor, out: Tensor, scale: float) -> None:
    if scale == 1.0 and src.dtype == out.dtype:
        out.copy_(src)
    elif src.numel():
        bucket(src, scale, out=out)


def reference_forward(src: Tensor, scale: float, out: Tensor) -> None:
    """The definition."""
    out.copy_(src.to(accumulate_dtype(src)) * scale)


def _native_unsupported(src: Tensor, scale: float, out: Tensor) -> str | None:
    return native_refusal(src) or native_refusal(out)


def _native_forward(src: Tensor, scale: float, out: Tensor) -> None:
    native.run(
        native.module().bucket_forward,
        src, out, src.numel(), scale, native.dtype_code(src), native.dtype_code(out),
        native.num_threads(),
    )  # fmt: skip


def _triton_unsupported(src: Tensor, scale: float, out: Tensor) -> str | None:
    return triton_refusal(src, out) or dtype_refusal(out.dtype)


def _triton_forward(src: Tensor, scale: float, out: Tensor) -> None:
    from pypar.kernels import bucket

    bucket.forward(src, scale, out)


BACKENDS = (
    Backend("native", _native_forward, None, _native_unsupported),
    Backend("triton", _triton_forward, None, _triton_unsupported),
    Backend("reference", reference_forward, None, never_refuses),
)


def _fake_forward(src: Tensor, scale: float, out: Tensor, backend: str) -> None:
    return None


_forward = register(
    "bucket",
    "forward",
    "(Tensor src, float scale, Tensor(a!) out, str backend) -> ()",
    BACKENDS,
    _fake_forward,
)
