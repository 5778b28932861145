"""Attention by a native module: the CPU's, the GPU's, or one that a test has built of the same sources."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.attention.arguments import AttentionProblem, Positions

_GPU_ROW_BYTES = 16  # what one asynchronous copy moves


def forward(
    module: ModuleType,
    problem: AttentionProblem,
    carry: tuple[Tensor, Tensor] | None,
    lse_rest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); a carry, fp32 (out, lse) over earlier keys, is continued: updated in place and returned.

    lse_rest: like lse, contiguous, receives what rounding takes off it. On the CPU only.
    """
    q = problem.q
    if carry is None:
        out = q.new_empty(problem.out_shape)
        lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    else:
        out, lse = carry
    arguments = _problem(problem)
    memory = _memory(native.run(module.attention_forward_memory, arguments), q)
    running_lse = lse.contiguous()
    native.run(
        module.attention_forward,
        arguments,
        _tensor(out),
        running_lse,
        _or_zero(lse_rest),
        carry is not None,
        memory,
    )
    if running_lse is not lse:
        lse.copy_(running_lse)
    return out, lse


def backward(
    module: ModuleType,
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
    dbias: Tensor | None,
    lse_rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), or, given fp32 tensors to add `into`, these. dbias: as in attention_reference.backward.

    lse_rest: as forward made it.
    """
    dq, dk, dv = into or (x.new_empty(x.shape) for x in (problem.q, problem.k, problem.v))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    arguments = _problem(problem)
    memory = _memory(native.run(module.attention_backward_memory, arguments, into is not None), problem.q)
    native.run(
        module.attention_backward,
        arguments,
        _tensor(dout),
        _tensor(out),
        lse,
        _or_zero(lse_rest),
        _or_zero(dlse),
        _tensor(dq),
        _tensor(dk),
        _tensor(dv),
        into is not None,
        _or_zero(dbias),
        memory,
    )
    return dq, dk, dv


def with_aligned_rows(problem: AttentionProblem) -> AttentionProblem:
    """The same problem with q, k and v as the GPU kernels read them: rows contiguous, 16-byte aligned."""
    return replace(problem, q=aligned(problem.q), k=aligned(problem.k), v=aligned(problem.v))


def aligned(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its rows are not contiguous or do not begin at multiples of 16 bytes."""
    size = x.element_size()
    starts = (native.address(x), *(stride * size for stride in x.stride()[:-1]))
    whole = x.stride(-1) == 1 and all(start % _GPU_ROW_BYTES == 0 for start in starts)
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _problem(problem: AttentionProblem) -> dict:
    q, k, v, bias = problem.q, problem.k, problem.v, problem.bias
    T, N, H = q.shape[-3:]
    S, G, Hv = v.shape[-3:]
    at = problem.positions or Positions()
    slopes = problem.alibi_slopes
    return {
        "B": problem.num_sequences,
        "T": T,
        "S": S,
        "N": N,
        "G": G,
        "H": H,
        "Hv": Hv,
        "q": _tensor(q),
        "k": _tensor(k),
        "v": _tensor(v),
        "cu_seqlens_q": _or_zero(problem.cu_seqlens_q),
        "cu_seqlens_k": _or_zero(problem.cu_seqlens_k),
        "scale": problem.scale,
        "softcap": problem.softcap,
        "left": problem.left,
        "right": problem.right,
        "bottom_right": problem.positions is None,
        "q_start": at.q_start,
        "k_start": at.k_start,
        "step": at.step,
        "batch_start": at.batch_start,
        "head_start": at.head_start,
        "bias": None if bias is None else _bias(bias.expand(problem.scores_shape)),
        "sinks": _or_zero(problem.sinks),
        "alibi_slopes": _or_zero(slopes),
        "alibi_batch_stride": 0 if slopes is None or slopes.dim() == 1 else slopes.shape[1],
        "dropout_p": problem.dropout_p,
        "dropout_threshold": math.floor(problem.dropout_p * 2**32),
        "seed": _or_zero(problem.seed),
        "num_threads": native.num_threads(),
        "stream": torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0,
    }


def _tensor(x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    strides = x.stride() if x.dim() == 4 else (0, *x.stride())
    return x, strides, native.dtype_code(x)


def _bias(x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    return x, x.stride(), native.dtype_code(x)


def _or_zero(x: Tensor | None) -> Tensor | int:
    """A contiguous tensor, 0 for none. The problem's small tensors are made contiguous when it is made."""
    return 0 if x is None else x


def _memory(num_bytes: int, like: Tensor) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
