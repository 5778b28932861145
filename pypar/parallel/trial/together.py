"""Ranks that try something together: none waits in a collective for one that has failed."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from pypar.axis import Axis
from pypar.comm import Traffic, all_reduce_start


class PeerFailedError(Exception):
    """Another rank of the axis raised an error in its run."""


class Together(Traffic):
    """Counts nothing: before each collective of the trial the ranks ask each other whether all are still running.

    A rank that raised an error says so once, instead of leaving the others in a collective.
    """

    __slots__ = ("_axis", "_device")

    def __init__(self, axis: Axis, device: torch.device) -> None:
        super().__init__(axis.name)
        self._axis, self._device = axis, device

    def record(self, collective: str, num_bytes: int) -> None:
        if not all_ranks(True, self._axis, self._device):
            raise PeerFailedError


def quiet(axis: Axis) -> Axis:
    """The axis with counters of its own: what a check sends is not the user's traffic."""
    return replace(axis, traffic=Traffic(axis.name))


def all_ranks(ok: bool, axis: Axis, device: torch.device) -> bool:
    """Whether ok is true on every rank of the axis."""
    flag = torch.tensor([int(ok)], dtype=torch.int32, device=device)
    return bool(all_reduce_start(flag, quiet(axis), dist.ReduceOp.MIN).wait().item())


def every_rank(
    axes: tuple[Axis, Axis], ok: bool, device: torch.device, *, has_failed_together: bool = False
) -> bool:
    """Whether ok is true on every rank of both axes; ``has_failed_together``: the ranks of the first know already
    that it is not."""
    ok = not has_failed_together and all_ranks(ok, axes[0], device)
    return all_ranks(ok, axes[1], device)
