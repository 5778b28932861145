"""The arguments of a call of context-parallel attention, checked on this rank alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pypar.context_parallel.call import Call
from pypar.context_parallel.layouts import check_part, segments_of
from pypar.context_parallel.masks import Mask
from pypar.mesh import Axis
from pypar.ops.attention.arguments import AttentionProblem, ScoreOptions, check_scores, problem_of


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the caller of `ring_attention` gave beside q, k, v and the group."""

    scores: ScoreOptions
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    length_q: int | None
    length_k: int | None
    layout: str
    method: str
    method_options: Mapping[str, Any]
    backend: str | None

    @property
    def ends_k(self) -> Tensor | None:
        return self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k

    def of_one_device(self, q: Tensor, seed: Tensor | None) -> dict[str, Any]:
        """The arguments of `pypar.attention` that say the same on one device; seed: drawn or given."""
        ends = (self.cu_seqlens, self.ends_k)
        ends_q, ends_k = (None if x is None else x.to(q.device) for x in ends)
        return {field.name: getattr(self.scores, field.name) for field in fields(self.scores)} | {
            "backend": self.backend,
            "cu_seqlens_q": ends_q,
            "cu_seqlens_k": ends_k,
            "dropout_seed": seed,
        }


def checked(q: Tensor, k: Tensor, v: Tensor, axis: Axis, arguments: Arguments) -> tuple[Call, Tensor]:
    """The call, and this rank's dropout seed, int64 [1], -1 where there is none. ValueError: what does not fit."""
    a = arguments
    problem = _problem(q, k, v, a)
    dim = 1 if a.cu_seqlens is None else 0
    lengths = [
        _length(name, x, x.shape[dim] * axis.size, cu_seqlens, given)
        for name, x, cu_seqlens, given in (
            ("length_q", q, a.cu_seqlens, a.length_q),
            ("length_k", k, a.ends_k, a.length_k),
        )
    ]
    mask = Mask(problem.left, problem.right, *(ends for _, ends in lengths))
    if len(mask.queries) != len(mask.keys):
        raise ValueError(
            f"cu_seqlens describes {len(mask.queries) - 1} documents and cu_seqlens_k {len(mask.keys) - 1}; they "
            "must describe the same ones"
        )
    for name, x, (length, _) in zip(("q", "k"), (q, k), lengths, strict=True):
        check_part(name, x.shape[dim], length, axis, a.layout, f"length_{name}")
    queries, keys = (
        tuple(segments_of(length, rank, axis.size, a.layout) for rank in range(axis.size))
        for length, _ in lengths
    )
    num_documents = None if a.cu_seqlens is None else len(mask.queries) - 1
    check_scores(q, k, None, a.scores.alibi_slopes, None, num_documents)
    call = Call(
        axis,
        queries,
        keys,
        a.layout,
        mask,
        problem.scale,
        problem.softcap,
        a.scores.sinks,
        None if a.scores.alibi_slopes is None else a.scores.alibi_slopes.detach(),
        None if a.scores.bias is None else _bias(a.scores.bias, q, mask.length_k, num_documents),
        problem.dropout_p,
        problem.seed,
        0,
        a.backend,
        a.method_options,
    )
    return call, no_seed(q) if problem.seed is None else problem.seed


def described(q: Tensor, k: Tensor, v: Tensor, call: Call, arguments: Arguments) -> dict[str, object]:
    """Everything that must be the same on every rank, by the name that an error gives it."""
    a, mask = arguments, call.mask
    dim = 1 if a.cu_seqlens is None else 0
    fields: dict[str, object] = {
        "method": a.method,
        "method_options": dict(a.method_options),
        "layout": a.layout,
        "length_q (R times a rank's positions where it was not passed)": mask.length_q,
        "length_k (R times a rank's positions where it was not passed)": mask.length_k,
    }
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = [str(n) for n in x.shape]
        shape[dim] = "T" if name == "q" else "S"
        fields[name] = f"[{', '.join(shape)}] {x.dtype}"
    fields["cu_seqlens"] = None if a.cu_seqlens is None else mask.queries
    fields["cu_seqlens_k"] = None if a.cu_seqlens is None else mask.keys
    fields["window with causal"] = (mask.left, mask.right)
    for name in ("scale", "softcap", "dropout_p", "backend"):
        fields[name] = getattr(call, name)
    fields["sinks"] = None if a.scores.sinks is None else tuple(a.scores.sinks.shape)
    fields["alibi_slopes"] = None if a.scores.alibi_slopes is None else tuple(a.scores.alibi_slopes.shape)
    fields["bias"] = (
        None if call.bias is None else (*call.bias.shape[:2], *call.bias.shape[3:], call.bias.dtype)
    )
    if a.scores.dropout_p > 0 and a.scores.dropout_seed is None:
        fields["drawn"] = "a seed"
    elif isinstance(a.scores.dropout_seed, int) or (
        a.scores.dropout_seed is not None and a.scores.dropout_seed.is_cpu
    ):
        fields["dropout_seed"] = int(a.scores.dropout_seed)
    leaves = (("q", q), ("k", k), ("v", v), ("sinks", a.scores.sinks), ("bias", a.scores.bias))
    recorded = [name for name, x in leaves if x is not None and x.requires_grad and torch.is_grad_enabled()]
    fields["whether a gradient is wanted"] = bool(recorded)
    return fields


def no_seed(q: Tensor) -> Tensor:
    return torch.full((1,), -1, dtype=torch.int64, device=q.device)


def _problem(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> AttentionProblem:
    """All that does not ask how long the whole sequence is, checked as the op does."""
    if a.cu_seqlens is None and a.cu_seqlens_k is not None:
        raise ValueError(
            "cu_seqlens_k is there without cu_seqlens; pass both, or cu_seqlens for self-attention"
        )
    if a.cu_seqlens is not None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 3:
                raise ValueError(
                    f"{name} {tuple(x.shape)} must be [positions on this rank, heads, head size] with cu_seqlens; "
                    "reshape it"
                )
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return problem_of(q, k, v, replace(a.scores, alibi_slopes=None, bias=None))


def _length(
    name: str, x: Tensor, equal_parts: int, cu_seqlens: Tensor | None, given: int | None
) -> tuple[int, tuple[int, ...]]:
    """(positions in the whole sequence, where its documents begin and end)."""
    if cu_seqlens is None:
        length = equal_parts if given is None else given
        return length, (0, length)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be int32 of shape [documents + 1], with "
            "one document at least"
        )
    ends = tuple(cu_seqlens.tolist())
    if ends[0] != 0 or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(f"cu_seqlens {ends[:8]}... must start at 0 and not decrease")
    if given is not None and given != ends[-1]:
        raise ValueError(f"{name} ({given}) must be the end of the last document ({ends[-1]}), or None")
    return ends[-1], ends


def _bias(bias: Tensor, q: Tensor, length_k: int, num_documents: int | None) -> Tensor:
    """With all four dimensions."""
    if num_documents is not None:
        raise ValueError("bias does not combine with cu_seqlens; pad the documents to one length for it")
    scores = (q.shape[0], q.shape[2], q.shape[1], length_k)
    fits = bias.dim() <= 4 and all(
        b in (1, s) for b, s in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias {tuple(bias.shape)} must broadcast to [B, N, T, S] = {scores}: the rows of this rank's queries "
            "and the keys of the whole sequence"
        )
    whole = bias[(None,) * (4 - bias.dim())]
    one = whole.new_empty(1, 1, 1, 1)
    check_scores(q, q, None, None, one, None)  # its dtype and device
    return whole
