"""The order of a chunk's steps, on one device and over ranks that each have a part of the vocabulary.

Whoever has only a part of the vocabulary gives `Ranks`, which join the parts: then a chunk's statistics travel while
the next chunk is multiplied, and the sum of its hidden gradient while the next one is differentiated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pypar.ops.linear_cross_entropy.chunks import Chunk, ChunkedLoss, Gradients, LossProblem, Needs, Sums
from pypar.ops.linear_cross_entropy.rows import Coefficients

CoefficientsOf = Callable[
    [Tensor, Tensor | slice], Coefficients
]  # (state [4, n], which of the tokens these are)


class Started(Protocol):
    def wait(self) -> Tensor: ...


class Ranks(Protocol):
    """Those who have the other parts of the vocabulary."""

    def join_start(self, state: Tensor) -> Started:
        """Of every rank's statistics [4, n] those of all words."""
        ...

    def sum_start(self, x: Tensor) -> Started:
        """The sum of every rank's x, in place."""
        ...


def _run(
    loss: ChunkedLoss,
    ranks: Ranks | None,
    coefficients: CoefficientsOf | None,
    needs: Needs,
    known: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """known: the statistics of all tokens; None: they are found, and returned."""
    hidden, sums = loss.hidden, Sums()
    statistics = hidden.new_zeros(4, hidden.shape[0], dtype=loss.dtype) if known is None else known
    if needs[0]:
        sums.hidden = hidden.new_empty(loss.num_tokens, hidden.shape[1])
    waiting: deque[tuple[Chunk, Started | None]] = deque()
    reductions: list[Started] = []
    num_done = 0

    def finish(chunk: Chunk, started: Started | None) -> None:
        nonlocal num_done
        if started is not None:
            chunk.state = started.wait()
        if known is None:
            statistics[:, chunk.rows] = chunk.state
        if coefficients is None:
            return
        into = place = None
        if sums.hidden is not None:
            place = sums.hidden[num_done : num_done + len(chunk.targets)]
            into = place if place.dtype == loss.dtype else torch.empty_like(place, dtype=loss.dtype)
            num_done += len(chunk.targets)
        loss.differentiate(chunk, coefficients(chunk.state, chunk.rows), sums, needs, into)
        if place is not None and into is not None:
            if into is not place:
                place.copy_(into)
            if ranks is not None:
                reductions.append(ranks.sum_start(place))

    for chunk in loss.chunks():
        started = None
        if known is None:
            loss.measure(chunk, keep_logits=coefficients is not None)
            started = None if ranks is None else ranks.join_start(chunk.state)
        else:
            chunk.state = known[:, chunk.rows]
        waiting.append((chunk, started))
        if len(waiting) > (started is not None):
            finish(*waiting.popleft())
    while waiting:
        finish(*waiting.popleft())
    for reduction in reductions:
        reduction.wait()
    return statistics, loss.gradients(sums, needs)


def measure_all(problem: LossProblem, ranks: Ranks | None) -> Tensor:
    """[4, T]: statistics of every token, zeros for those that do not take part."""
    return _run(ChunkedLoss(problem), ranks, None, (False, False, False))[0]


def measure_and_differentiate(
    problem: LossProblem, ranks: Ranks | None, coefficients: CoefficientsOf, needs: Needs
) -> tuple[Tensor, Gradients]:
    """Statistics [4, T], and gradients by what `coefficients` makes of a chunk's statistics."""
    return _run(ChunkedLoss(problem), ranks, coefficients, needs)


def differentiate_all(
    problem: LossProblem, ranks: Ranks | None, coefficients: CoefficientsOf, state: Tensor, needs: Needs
) -> Gradients:
    """Gradients from the statistics [4, T] of `measure_all`; the logits are multiplied again."""
    return _run(ChunkedLoss(problem), ranks, coefficients, needs, state)[1]
