"""Attention in Triton: forward and backward of a problem that pypar.ops.attention describes.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, in fp32 where these are bfloat16: the interpreter
computes with
bfloat16 as with integers.
"""

import contextlib
import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_forward import _attention_forward_kernel
from .attention_launches import Launch, backward_launches, device_of, forward_launches

INTERPRETED = not isinstance(_attention_forward_kernel, triton.JITFunction)


def attention_forward(
    problem: Any, carry: tuple[Tensor, Tensor] | None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse): new ones, or carry's, continued in place. splits: programs that share a block's keys;
    None: chosen."""
    q = problem.q
    if INTERPRETED and q.dtype == torch.bfloat16:
        out, lse = attention_forward(_in_fp32(problem), carry, splits)
        return (out, lse) if carry is not None else (out.to(q.dtype), lse)
    if carry is None:
        out = q.new_empty(problem.out_shape)
        lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    else:
        out, lse = carry
    running_lse = lse.contiguous()
    _run(forward_launches(problem, device_of(q.device), out, running_lse, carry is not None, splits), q)
    if running_lse is not lse:
        lse.copy_(running_lse)
    return out, lse


def attention_backward(
    problem: Any,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): new ones, or `into`'s, added to. dbias [B, N, T, S], fp32, zero, gets the bias's
    gradient."""
    q = problem.q
    if INTERPRETED and q.dtype == torch.bfloat16:
        found = attention_backward(_in_fp32(problem), dout.float(), out.float(), lse, dlse, into, dbias)
        return found if into is not None else tuple(x.to(q.dtype) for x in found)
    gradients = into
    if gradients is None:
        gradients = tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, problem.k, problem.v)
        )
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    launches = backward_launches(
        problem, device_of(q.device), dout, out, lse, dlse, gradients, into is not None, dbias
    )
    _run(launches, q)
    return gradients


def _in_fp32(problem: Any) -> Any:
    bias = problem.bias if problem.bias is None else problem.bias.float()
    return dataclasses.replace(
        problem, q=problem.q.float(), k=problem.k.float(), v=problem.v.float(), bias=bias
    )


def _run(launches: list[Launch], q: Tensor) -> None:
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        for launch in launches:
            launch.run()
