"""Pipeline schedules: pure functions of (num_ranks, num_microbatches) that return, per rank, a list of
`Action`s.

Every public function of this file whose first two arguments have these names is a schedule and is found by
its name (`catalog.build`), so a new schedule is a new function here and nothing else.
"""

from __future__ import annotations

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, Action


def gpipe(num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965).

    Stage r is on rank r. Every rank holds the activations of all microbatches at its peak. With equal stages
    the share of idle time is (p-1)/(m+p-1) for p ranks and m microbatches. Backwards run in the order of the
    forwards.
    """
    _check(num_ranks, num_microbatches)
    return [
        [Action(FORWARD, rank, i) for i in range(num_microbatches)]
        + [Action(BACKWARD, rank, i) for i in range(num_microbatches)]
        for rank in range(num_ranks)
    ]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    """One forward, one backward in turn (PipeDream-Flush, Narayanan et al., arXiv 2006.09503; Megatron-LM,
    2104.04473).

    Stage r is on rank r. Rank r starts with min(m, p-1-r) forwards, so it never holds more than min(m, p-r)
    microbatches; the idle time is that of `gpipe`.
    """
    _check(num_ranks, num_microbatches)
    schedule = []
    for rank in range(num_ranks):
        warm_up = min(num_microbatches, num_ranks - 1 - rank)
        forwards = [Action(FORWARD, rank, i) for i in range(num_microbatches)]
        backwards = [Action(BACKWARD, rank, i) for i in range(num_microbatches)]
        actions = forwards[:warm_up]
        for i in range(num_microbatches - warm_up):
            actions += [forwards[warm_up + i], backwards[i]]
        schedule.append(actions + backwards[num_microbatches - warm_up :])
    return schedule


def _check(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1:
        raise ValueError(f"num_ranks ({num_ranks}) must be at least 1; pass the size of the pp axis")
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches ({num_microbatches}) must be at least 1; use 1 for no splitting")
