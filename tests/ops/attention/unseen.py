"""Ways for a query not to see a key, what is put into those that are not seen, and whom it may reach."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pypar.ops.attention.arguments import AttentionProblem, attention_problem
from pypar.ops.attention.reference import sequences
from pypar.ops.rows import accumulate_dtype

POISONS = [math.nan, math.inf]
# Of each operand, the results of those who see a NaN in it that are NaN then.
REACHED = {
    "k": ("out", "lse", "dq", "dk", "dv"),
    "v": ("out", "dq", "dk"),
    "q": ("out", "lse", "dq", "dk", "dv"),
    "dout": ("dq", "dk", "dv"),
}


@dataclass(frozen=True)
class Way:
    """Not to see a key: lengths, options of attention_problem, and the keys (of S) and queries (of T) to poison."""

    T: int
    S: int
    keys: tuple[int, ...]
    rows: tuple[int, ...]
    options: dict
    lengths: tuple[int, ...] | None = None  # of documents, of queries and of keys
    hidden: str | None = None  # what a bias hides
    B: int = 1
    N: int = 2
    G: int = 1
    H: int = 24
    Hv: int = 20


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(way: Way, dtype: torch.dtype) -> tuple[AttentionProblem, Tensor]:
    """(problem, dout)."""
    batch = () if way.lengths else (way.B,)
    shapes = {"q": (way.T, way.N, way.H), "k": (way.S, way.G, way.H), "v": (way.S, way.G, way.Hv)}
    tensors = {
        name: draw(*batch, *shape, seed=seed, dtype=dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    options, wide = dict(way.options), accumulate_dtype(tensors["q"])
    if options.pop("sinks", False):
        options["sinks"] = draw(way.N, seed=5, dtype=wide)
    if options.pop("alibi", False):
        options["alibi_slopes"] = draw(way.N, seed=6, dtype=wide).abs() / 20
    if way.lengths:
        ends = torch.tensor((0, *way.lengths)).cumsum(0)
        for name, total in (("cu_seqlens_q", way.T), ("cu_seqlens_k", way.S)):
            options[name] = (ends * total // ends[-1]).int()
    if way.hidden == "keys":
        options["bias"] = draw(1, 1, 1, way.S, seed=7, dtype=dtype)
        options["bias"][..., [*range(10, 20), *way.keys]] = -math.inf
    if way.hidden == "pairs":
        options["bias"] = draw(way.B, way.N, way.T, way.S, seed=7, dtype=dtype)
        options["bias"][draw(*options["bias"].shape, seed=8, dtype=torch.float32) > 0] = -math.inf
    return attention_problem(**tensors, **options), draw(*batch, way.T, way.N, way.Hv, seed=4, dtype=dtype)


def seen_pairs(problem: AttentionProblem) -> Tensor:
    """[B, N, T, S]; of sequences one after the other B is 1."""
    T, S = problem.q.shape[-3], problem.k.shape[-3]
    seen = torch.zeros(
        1 if problem.varlen else problem.q.shape[0], problem.q.shape[-2], T, S, dtype=torch.bool
    )
    for part, rows, keys in sequences(problem):
        at = part.positions
        distance = at.q_start + at.step * torch.arange(rows.stop - rows.start)[:, None]
        distance = distance - (at.k_start + at.step * torch.arange(keys.stop - keys.start))
        near = torch.ones_like(distance, dtype=torch.bool)
        if problem.left >= 0:
            near &= distance <= problem.left
        if problem.right >= 0:
            near &= -distance <= problem.right
        seen[:, :, rows, keys] = near
    return seen if problem.bias is None else seen & (problem.bias != -math.inf)


def poisoned(
    problem: AttentionProblem, dout: Tensor, what: str, at: tuple[int, ...], value: float
) -> tuple[AttentionProblem, Tensor]:
    x = (dout if what == "dout" else getattr(problem, what)).clone()
    x[..., list(at), :, :] = value
    return (problem, x) if what == "dout" else (replace(problem, **{what: x}), dout)


def reach(problem: AttentionProblem, what: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, N, T] and keys [B, G, S] whose results the poison reaches, and the pairs that see each other."""
    seen = seen_pairs(problem)
    if what in "kv":
        rows = seen[..., list(at)].any(-1)
    else:
        rows = torch.zeros(seen.shape[:-1], dtype=torch.bool)
        rows[..., list(at)] = True
    keys = (seen & rows.unsqueeze(-1)).any(-2)
    return rows, keys.unflatten(1, (problem.k.shape[-2], -1)).any(2), seen
