"""How fast the ranks of an axis compute and talk: what formulas of seconds need of a machine."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from pypar.mesh import Axis


@dataclass(frozen=True)
class MachineCosts:
    """Rates of one rank while all work. The defaults are of ranks of one thread in one host: x86-64, AVX-512, fp32.

    flops_per_s: attention, of the visible pairs only. call_s: one call of attention without work.
    row_s: what a call takes for each query of each head, however few keys there are; backward twice that.
    bytes_per_s: what a rank sends to ranks anywhere; latency_s: of a small message.
    near: this many neighbours on the axis share a host; near_bytes_per_s: among them.
    own_share: of the time of a transfer, how much is processor time of the ranks at its ends, which attention then
    does not get: 0 where a transfer hides entirely, 1 where hiding it saves nothing, as in shared memory.
    copy_bytes_per_s: packing and putting in order, in a rank's own memory; methods: of each that was measured its
    own seconds a byte in place of that, after what its step takes beside all of this.
    """

    flops_per_s: float = 140e9
    call_s: float = 150e-6
    bytes_per_s: float = 4e9
    latency_s: float = 60e-6
    near: int = 1
    near_bytes_per_s: float = 4e9
    own_share: float = 1.0
    row_s: float = 50e-9
    copy_bytes_per_s: float = 7e9
    methods: tuple[tuple[str, float, float], ...] = ()

    def step_s(self, method: str) -> float:
        """The seconds of a forward with its backward that do not depend on their size."""
        return next((step_s for name, step_s, _ in self.methods if name == method), 0.0)

    def written_s(self, method: str, num_bytes: float) -> float:
        """The seconds in which a method packs so many bytes and puts them in order."""
        for name, _, byte_s in self.methods:
            if name == method:
                return byte_s * num_bytes
        return num_bytes / self.copy_bytes_per_s

    def speed_of(self, neighbours: int) -> float:
        """Bytes a second among so many consecutive ranks."""
        inside = self.near >= neighbours and self.near % max(neighbours, 1) == 0
        return self.near_bytes_per_s if inside else self.bytes_per_s


CPU_COSTS = MachineCosts()
# Data sheet of an H100 in a host of 8 with NVLink and one 400 Gb/s port each, half of each limit; not measured.
GPU_COSTS = MachineCosts(
    400e12, 20e-6, 25e9, 20e-6, 8, 200e9, own_share=0.0, row_s=0.0, copy_bytes_per_s=1.5e12
)

MEASURED: weakref.WeakKeyDictionary[Axis, dict[torch.dtype, MachineCosts]] = weakref.WeakKeyDictionary()


def costs_of(axis: Axis, device: torch.device, dtype: torch.dtype) -> MachineCosts:
    """What `measure_costs` found on this axis, for this dtype if it can be; else the defaults for the device."""
    found = MEASURED.get(axis)
    if not found:
        return GPU_COSTS if device.type == "cuda" else CPU_COSTS
    return found.get(dtype) or next(iter(found.values()))
