"""The bytes of a store on this rank, by what they are for: now, and at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pypar.data_parallel.zero.members import Unit

CATEGORIES = ("parameters", "masters", "gradients", "gathered", "transient")


class Account:
    """What the storages of a store's tensors hold.

    parameters  what the model computes with and what always stays: whole, or at stage 3 this rank's rows
    masters     fp32 copies of this rank's rows, where the model computes with fewer bits
    gradients   at stages 0 and 1 whole ones, of which this rank's rows are a part; at 2 and 3 this rank's rows, and
                whole ones from the first that arrives to the end of their reduction
    gathered    at stage 3: whole parameters while they are here
    transient   sums on their way into rows that hold some already, zeros for what took no part

    beside  told of bytes as they are taken and given back; rows that lie elsewhere are then no part of this account
    """

    def __init__(self, beside: Callable[[int], None] | None = None) -> None:
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.peak = dict(self.now)
        self._beside = beside

    def add(self, category: str, num_bytes: int) -> None:
        """Bytes that were taken, or given back where negative."""
        if self._beside is not None:
            self._beside(num_bytes)
        self.now[category] += num_bytes
        self.peak[category] = max(self.peak[category], self.now[category])

    def begin(self, units: Sequence[Unit], *, cuts_parameters: bool) -> None:
        """Count what is there when the store has just been made."""
        for unit in units:
            for member in unit.members:
                master, share = member.master, member.share
                if self._beside is not None:
                    self.add("parameters", 0 if cuts_parameters else member.whole.nbytes)
                    continue
                self.add("parameters", share.nbytes if cuts_parameters else member.whole.nbytes)
                if master is not None and master.dtype != share.dtype:
                    self.add("masters", master.nbytes)
                if member.accumulated is not None:
                    self.add("gradients", member.accumulated.nbytes)
                elif member.gradient is not None:
                    self.add("gradients", member.gradient.nbytes)
        self.reset_peak()

    def reset_peak(self) -> None:
        """Let the peaks be what there is now."""
        self.peak = dict(self.now)
