"""How fast the ranks of an axis compute and talk: what the formulas of `cost` need of a machine."""

from __future__ import annotations

import hashlib
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_gather_start, exchange_start
from pypar.mesh import Axis, as_axis
from pypar.ops.attention import attention


@dataclass(frozen=True)
class MachineCosts:
    """Of one rank while all work. The defaults are of ranks of one thread in one host, rounded: x86-64, AVX-512, fp32.

    flops_per_s: attention, of the visible pairs only. call_s: one call of attention without work.
    bytes_per_s: what a rank sends to ranks anywhere; latency_s: of a small message.
    near: this many neighbours on the axis share a host; near_bytes_per_s: among them.
    """

    flops_per_s: float = 100e9
    call_s: float = 150e-6
    bytes_per_s: float = 1.2e9
    latency_s: float = 60e-6
    near: int = 1
    near_bytes_per_s: float = 1.2e9

    def speed_of(self, neighbours: int) -> float:
        """Bytes a second among so many consecutive ranks."""
        inside = self.near >= neighbours and self.near % max(neighbours, 1) == 0
        return self.near_bytes_per_s if inside else self.bytes_per_s


CPU_COSTS = MachineCosts()
# Data sheet of an H100 in a host of 8 with NVLink and one 400 Gb/s port each, half of each limit; not measured.
GPU_COSTS = MachineCosts(400e12, 20e-6, 25e9, 20e-6, 8, 200e9)

_measured: weakref.WeakKeyDictionary[Axis, MachineCosts] = weakref.WeakKeyDictionary()


def costs_of(axis: Axis, device: torch.device) -> MachineCosts:
    """What `measure_costs` found on this axis, else the defaults for the device."""
    return _measured.get(axis) or (GPU_COSTS if device.type == "cuda" else CPU_COSTS)


def measure_costs(
    group: Axis | dist.ProcessGroup, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MachineCosts:
    """Measures an axis in about a second, once; every rank calls it, and all get the slowest rank's numbers.

    Calls of `ring_attention(method="auto")` with this Axis use them from then on. Stops the host until the device
    has finished, several times.
    """
    axis = as_axis(group)
    if axis not in _measured:
        _measured[axis] = _measure(axis, torch.device(device), dtype)
    return _measured[axis]


def _measure(axis: Axis, device: torch.device, dtype: torch.dtype) -> MachineCosts:
    near = _ranks_of_a_host(axis, device)
    message_bytes = 1 << (26 if device.type == "cuda" else 22)
    large, small = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (message_bytes, 16))
    far = near if near < axis.size else 1
    latency_s = _best(lambda: _shift(axis, small, far, axis.size), 8, device)
    far_s = _best(lambda: _shift(axis, large, far, axis.size), 4, device)
    near_s = _best(lambda: _shift(axis, large, 1, near), 4, device) if near > 1 else far_s
    length = 4096 if device.type == "cuda" else 512
    call_s = _best(lambda: _attend(1, dtype, device), 8, device)
    compute_s = _best(lambda: _attend(length, dtype, device), 4, device)
    flops = 2 * length * length * 4 * 7 * 64  # forward 2 products, backward 5
    mine = torch.tensor([compute_s, call_s / 2, far_s, near_s, latency_s], dtype=torch.float64, device=device)
    everyone = (
        all_gather_start(mine, axis).wait().view(axis.size, -1).cpu() if axis.size > 1 else mine[None].cpu()
    )
    compute_s, call_s, far_s, near_s, latency_s = everyone.amax(0).tolist()
    carried_s = [max(s - latency_s, 1e-9) for s in (far_s, near_s)]
    return MachineCosts(
        flops / max(compute_s - 2 * call_s, 1e-9),
        call_s,
        message_bytes / carried_s[0],
        latency_s,
        near,
        message_bytes / carried_s[1],
    )


def _ranks_of_a_host(axis: Axis, device: torch.device) -> int:
    """How many consecutive ranks share a host, on every host; 1 where they are spread otherwise."""
    if axis.size == 1:
        return 1
    name = (
        int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=8).digest(), "little") >> 1
    )
    hosts = all_gather_start(torch.tensor([name], device=device), axis).wait().tolist()
    near = next((i for i, host in enumerate(hosts) if host != hosts[0]), axis.size)
    alike = axis.size % near == 0 and all(host == hosts[i - i % near] for i, host in enumerate(hosts))
    return near if alike else 1


def _shift(axis: Axis, x: Tensor, by: int, within: int) -> None:
    """Every rank sends to the one `by` further on, round each `within` consecutive ranks."""
    if axis.size == 1:
        return
    first = axis.rank - axis.rank % within
    to, origin = (first + (axis.rank - first + step) % within for step in (by, -by))
    sent, received = exchange_start([(x, to)], [(torch.empty_like(x), origin)], axis)
    for handle in (*received, *sent):
        handle.wait()


def _attend(length: int, dtype: torch.dtype, device: torch.device) -> None:
    q = torch.zeros(1, length, 4, 64, dtype=dtype, device=device, requires_grad=True)
    attention(q, q, q).sum().backward()


def _best(function: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Seconds of the fastest of some rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
