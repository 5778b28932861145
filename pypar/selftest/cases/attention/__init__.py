"""Cases of attention: every option, alone and together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pypar.ops.attention import attention, attention_backward, attention_forward
from pypar.ops.attention.arguments import AttentionProblem, Positions, Window, attention_problem
from pypar.selftest.case import Case, Draw, Function, Inputs, Peer
from pypar.selftest.cases.attention import fused
from pypar.selftest.cases.attention.plain import plain_attention


def cases(large: bool) -> list[Case]:
    L, N, B = (1024, 16, 2) if large else (256, 4, 1)
    bottom = L // 4
    return [
        dense("full, lse", L, L, N=N, B=B, return_lse=True),
        dense("causal, grouped heads", 2 * L, 2 * L, N=N, G=N // 4, H=128, causal=True, quick=True),
        dense("causal, odd lengths", L - 1, L + 3, H=40, causal=True),
        dense("causal, more queries than keys", 203, 113, H=96, causal=True),
        dense("large heads", 215, 203, H=256, causal=True),
        dense("value heads smaller", L, L, H=192, Hv=128, N=N, causal=True),
        dense("value heads larger", 127, 513, H=64, Hv=128),
        dense("heads before positions", 217, 239, B=2, heads_first=True),
        dense("causal, window", 4 * L, 4 * L, N=N, causal=True, window=(bottom, None), quick=True),
        dense("window on both sides", 2 * L + 1, 2 * L - 1, window=(bottom, 7)),
        lengths_causal("several lengths, causal", [L - 3, 1, 0, L // 2 + 5, 2 * L], N=N, G=N // 2),
        dense("softcap, lse", L, L, N=N, softcap=3.0, return_lse=True),
        dense("ALiBi", L, L, N=4 * N, G=N, B=2, causal=True, slopes=True),
        dense("bias", L, L + 16, N=N, bias=True),
        dense("sinks, lse", 217, 301, N=16, G=4, causal=True, window=(100, 0), sinks=True, return_lse=True),
        dense("dropout", L, L, N=N, B=B, dropout_p=0.17, dropout_seed=2**40 + 11, quick=True),
        dense("one query", 1, 32 * L, N=2 * N, G=N // 2, H=128, backward=False, quick=True),
        dense("eight queries, causal", 8, 131, N=4 * N, G=N, H=128, causal=True),
        _in_two_parts(L, 2 * L + 9, N),
        dense(
            "all together", 203, 301, N=16, G=4, B=2, H=72, Hv=40, causal=True, window=(113, 0), softcap=2.0,
            slopes=True, sinks=True, bias=True, dropout_p=0.3, dropout_seed=5, return_lse=True,
        ),
    ]  # fmt: skip


def dense(  # noqa: PLR0913
    name: str, T: int, S: int, *, N: int = 4, G: int = 2, H: int = 64, Hv: int | None = None, B: int = 1,
    heads_first: bool = False, slopes: bool = False, bias: bool = False, sinks: bool = False,
    backward: bool = True, quick: bool = False, **options: Any,
) -> Case:  # fmt: skip
    """Inputs [B, T, N, H] and options, those of pypar.attention."""
    Hv = Hv or H

    def inputs(draw: Draw) -> Inputs:
        sizes = {"q": (T, N, H), "k": (S, G, H), "v": (S, G, Hv)}
        tensors = {
            key: draw.normal(B, heads, length, size).transpose(1, 2)
            if heads_first
            else draw.normal(B, length, heads, size)
            for key, (length, heads, size) in sizes.items()
        }
        if sinks:
            tensors["sinks"] = draw.normal(N, fp32=True)
        if bias:
            tensors["bias"] = draw.normal(1, N, T, S)
        if slopes:
            tensors["alibi_slopes"] = 2.0 ** -torch.arange(4, N + 4, device=draw.device).float()
        return tensors

    causal, window = options.get("causal", False), options.get("window")
    extra = [name for name, there in (("sinks", sinks), ("bias", bias)) if there]
    gradients = ("q", "k", "v", *extra) if backward else ()
    return Case(
        name=name,
        shape=f"B{B} T{T} S{S} N{N} G{G} H{H}" + (f" Hv{Hv}" if Hv != H else ""),
        inputs=inputs,
        gradients=gradients,
        ours=functools.partial(attention, **options),
        plain=_plain(options),
        peer=_peer(causal, window, T == S, sinks, slopes, bias, options),
        flops=fused.flops(B * fused.visible_pairs(T, S, causal, window), N, H, Hv),
        quick=quick,
    )


def _plain(options: dict[str, Any]) -> Function:
    """plain_attention with these options of pypar.attention: out, or (out, lse) with return_lse."""
    wants_lse = options.get("return_lse", False)
    keywords = {name: value for name, value in options.items() if name != "return_lse"}
    return functools.partial(plain_attention, return_lse=wants_lse, **keywords)


def _peer(
    causal: bool, window: Window | None, square: bool, sinks: bool, slopes: bool, bias: bool, options: dict
) -> Peer:
    """The fastest that torch has for these options."""
    name = "F.scaled_dot_product_attention"
    if sinks or options.get("softcap"):
        return Peer("matmul, softmax, matmul", _plain(options | {"return_lse": False}))
    call = functools.partial(fused.sdpa, dropout_p=options.get("dropout_p", 0.0))
    if bias:
        return Peer(f"{name}, mask", lambda q, k, v, bias: call(q, k, v, bias))
    if slopes or window or (causal and not square):
        return Peer(f"{name}, mask", call, _mask_of(causal, window))
    return Peer(name, functools.partial(call, is_causal=causal))


def _mask_of(causal: bool, window: Window | None) -> Callable[[Inputs], Inputs]:
    """q, k, v and the mask that torch's function needs for what ours computes as it goes."""

    def prepare(inputs: Inputs) -> Inputs:
        q, k = inputs["q"], inputs["k"]
        T, S = q.shape[1], k.shape[1]
        mask = fused.visible(T, S, causal, window, q.device)
        if "alibi_slopes" in inputs:
            away = fused.distances(T, S, q.device)
            slopes = inputs["alibi_slopes"][..., None, None]
            mask = (-slopes * away).masked_fill(~mask, -torch.inf).to(q.dtype)
        return {"q": q, "k": k, "v": inputs["v"], "mask": mask}

    return prepare


def lengths_causal(name: str, lengths: list[int], N: int, G: int, H: int = 64) -> Case:
    """Sequences of these lengths one after the other, causal."""
    total = sum(lengths)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pairs = sum(fused.visible_pairs(length, length, True) for length in lengths)

    def inputs(draw: Draw) -> Inputs:
        tensors = {
            "q": draw.normal(total, N, H),
            "k": draw.normal(total, G, H),
            "v": draw.normal(total, G, H),
        }
        return tensors | {"cu_seqlens_q": draw.numbers(*ends), "cu_seqlens_k": draw.numbers(*ends)}

    return Case(
        name=name,
        shape=f"T{total} in {len(lengths)} N{N} G{G} H{H}",
        inputs=inputs,
        gradients=("q", "k", "v"),
        ours=functools.partial(attention, causal=True),
        plain=_plain({"causal": True}),
        peer=Peer(
            "F.scaled_dot_product_attention, padded, mask",
            fused.sdpa,
            functools.partial(fused.padded, causal=True),
        ),
        flops=fused.flops(pairs, N, H, H),
    )


def _in_two_parts(T: int, S: int, N: int) -> Case:
    """What a ring does: attention over some of the keys, continued over the others; gradients added up in fp32."""
    whole = dense("carried on over two parts, lse", T, S, N=N, causal=True, return_lse=True)

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return _InTwoParts.apply(q, k, v, backend)

    return replace(whole, ours=ours)


class _InTwoParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        carry = (
            torch.zeros((*q.shape[:-1], v.shape[-1]), device=q.device),
            torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, device=q.device),
        )
        for part, _ in _parts(q, k, v):
            carry = attention_forward(part, carry, backend=backend)
        out, lse = carry[0].to(q.dtype), carry[1]
        ctx.backend = backend
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout, dlse = gradients
        dq, dk, dv = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
        for part, keys in _parts(q, k, v):
            into = dq, dk[:, keys], dv[:, keys]
            attention_backward(part, dout.contiguous(), out, lse, dlse, into, backend=ctx.backend)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None


def _parts(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[AttentionProblem, slice]]:
    T, S = q.shape[1], k.shape[1]
    middle = S // 3
    return [
        (
            attention_problem(
                q, k[:, keys], v[:, keys], causal=True, positions=Positions(q_start=S - T, k_start=keys.start)
            ),
            keys,
        )
        for keys in (slice(0, middle), slice(middle, S))
    ]
