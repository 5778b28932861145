"""One call of attention over a sharded sequence, checked: what every method receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pypar.context_parallel.layouts import Segments
from pypar.context_parallel.masks import Mask, Piece, pieces
from pypar.mesh import Axis


@dataclass(frozen=True, eq=False)
class Call:
    """Everything but q, k and v, which are this rank's parts.

    axis: the ranks that share the sequence.
    queries, keys: what each rank of the axis holds of both, by rank.
    layout: the name of the layout they come from. mask: of the whole sequence.
    sinks [N], alibi_slopes [N] or [B, N] (with documents [documents, N]), bias [B|1, N|1, T|1, S|1] with this
    rank's queries and the keys of the whole sequence in their order: as in `pypar.attention`. Sinks and bias may
    need a gradient; a rank's is its queries' share.
    seed: int64 [1], the same on every rank; None without dropout.
    head_start: which query head of the whole the first one here is, for dropout.
    method_options: what the caller gave for the method alone; the method refuses what it does not know.
    """

    axis: Axis
    queries: tuple[Segments, ...]
    keys: tuple[Segments, ...]
    layout: str
    mask: Mask
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    head_start: int = 0
    backend: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def merges(self) -> bool:
        """Whether positions matter to the mask alone."""
        return self.alibi_slopes is None and self.bias is None and self.dropout_p == 0

    def pieces(self, rank: int, source: int) -> tuple[Piece, ...]:
        """What the queries of `rank` see of the keys of `source`."""
        return pieces(self.queries[rank], self.keys[source], self.mask, self.merges)

    def with_seed(self, seed: Tensor) -> Call:
        """This call with another seed, where there is dropout."""
        return self if self.seed is None else replace(self, seed=seed)


Method = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
"""(q, k, v, call) -> (out, lse), both differentiable.

q [B, T, N, H], k [B, S, G, H], v [B, S, G, Hv], with documents without B: this rank's parts, of which T or S may
be 0. out like q with Hv, in q's dtype, lse [B, N, T] in fp32 (fp64 for fp64); sinks are in both.
`methods.registry` lists every method.
"""


def refuse_options(method: str, options: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """ValueError for an option of a method that the method does not know."""
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"method {method!r} has no option {name!r}; it {takes}")
