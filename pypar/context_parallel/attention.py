"""Attention over a sequence whose positions are spread over the ranks of an axis: the entry to all methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch.distributed as dist
from torch import Tensor

from pypar.context_parallel.agreement import agree
from pypar.context_parallel.arguments import Arguments, checked, described, no_seed
from pypar.context_parallel.methods.registry import method_named
from pypar.mesh import Axis, as_axis
from pypar.ops.attention import attention
from pypar.ops.attention.arguments import ScoreKeywords, ScoreOptions, Window
from pypar.ops.uncompiled import between_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Axis | dist.ProcessGroup,
    *,
    layout: str = ...,
    method: str = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    length_q: int | None = ...,
    length_k: int | None = ...,
    return_lse: Literal[False] = ...,
    method_options: Mapping[str, Any] | None = ...,
    backend: str | None = ...,
    **options: Unpack[ScoreKeywords],
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Axis | dist.ProcessGroup,
    *,
    layout: str = ...,
    method: str = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    length_q: int | None = ...,
    length_k: int | None = ...,
    return_lse: Literal[True],
    method_options: Mapping[str, Any] | None = ...,
    backend: str | None = ...,
    **options: Unpack[ScoreKeywords],
) -> tuple[Tensor, Tensor]: ...
@between_ranks("ring_attention")
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Axis | dist.ProcessGroup,
    *,
    layout: str = "zigzag",
    method: str = "ring",
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    length_q: int | None = None,
    length_k: int | None = None,
    return_lse: bool = False,
    method_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`pypar.attention` over a sequence whose positions are spread over `group` as `layout` says; exact.

    Args:
        q, k, v: this rank's part, [B, T, N, H], [B, S, G, H] and [B, S, G, Hv] with N a multiple of G; with
            cu_seqlens without B. Queries and keys are sharded by the same layout, each over its own length. A
            part may be empty. Rotary positions come from `positions`.
        layout: a name of `layouts.LAYOUTS`; the one with which the sequence was sharded.
        method: how the ranks work together, a name that `methods.methods` lists.
        causal, scale, window, softcap: as in `pypar.attention`, of positions in the whole sequence.
        sinks, alibi_slopes: as there, the same on every rank.
        bias: broadcasts to [B, N, T, whole S]: the rows of this rank's queries, all keys in their order.
        dropout_p, dropout_seed: as there; the same elements drop on any number of ranks. Without a seed the first
            rank's generator draws one for all.
        cu_seqlens: int32 [documents + 1], where documents begin and end in the whole sequence of queries, and of
            keys where cu_seqlens_k does not say otherwise; the same on every rank. The host reads the values:
            with q on a GPU, pass them on the CPU.
        length_q, length_k: positions in the whole sequence. None: cu_seqlens says it; else all ranks hold equally
            many, so it is R times this rank's. A length that does not divide by R must be passed.
        method_options: of the method alone. backend: of the attention op.

    Returns this rank's part of the output, [B, T, N, Hv] in q's dtype; with return_lse also lse [B, N, T] (with
    cu_seqlens [N, T]). Both are differentiable; the gradients of sinks and bias are the share of this rank's
    queries: their sum over the axis is the whole. On one rank it is `pypar.attention`. Each rank sends what
    `volume` says.
    torch.compile ends its graph here (with fullgraph=True torch's error says so).
    ValueError, on every rank and before any data moves: torch.func's transforms, arguments that do not fit, or differ
    between ranks (on GPUs the ranks compare each combination of shapes and options once).
    """
    axis = as_axis(group)
    scores = ScoreOptions(causal, scale, window, softcap, sinks, alibi_slopes, bias, dropout_p, dropout_seed)
    arguments = Arguments(
        scores, cu_seqlens, cu_seqlens_k, length_q, length_k, layout, method, method_options or {}, backend
    )
    refusal: ValueError | None = None
    try:
        run = method_named(method)
        call, seed = checked(q, k, v, axis, arguments)
    except ValueError as error:
        if axis.size == 1:
            raise
        refusal = error
    if axis.size == 1:
        out, lse = attention(q, k, v, **arguments.of_one_device(q, call.seed), return_lse=True)
        return (out, lse) if return_lse else out
    if refusal is not None:
        agree(axis, {"refused": str(refusal)}, no_seed(q))
        raise refusal
    difference, seed = agree(axis, described(q, k, v, call, arguments), seed)
    if difference is not None:
        raise ValueError(difference)
    out, lse = run(q, k, v, call.with_seed(seed))
    return (out, lse) if return_lse else out
