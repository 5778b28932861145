"""Measures what the formulas of `seconds` need of a machine: `measure_costs`."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_gather_start, exchange_start
from pypar.context_parallel.attention import ring_attention
from pypar.context_parallel.auto.seconds import Expected
from pypar.context_parallel.auto.volume import Sizes
from pypar.context_parallel.call import Call
from pypar.context_parallel.layouts import Segment, segments_of
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.methods.blockwise import add_backward, add_forward, empty_sums
from pypar.cost.machine import MEASURED, MachineCosts
from pypar.mesh import Axis, as_axis
from pypar.ops.attention.arguments import UNBOUNDED
from pypar.ops.uncompiled import between_ranks

_HEADS = 4  # of the attention that is measured


@between_ranks("measure_costs")
def measure_costs(
    group: Axis | dist.ProcessGroup, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MachineCosts:
    """Measures an axis in about a second, once for each dtype; every rank calls it, and all get the same numbers.

    These are the slowest rank's. Calls of `ring_attention(method="auto")` with this Axis use them from then on.
    Stops the host until the device has finished, several times.
    """
    axis = as_axis(group)
    found = MEASURED.setdefault(axis, {})
    if dtype not in found:
        found[dtype] = _measure(axis, torch.device(device), dtype)
    return found[dtype]


def _measure(axis: Axis, device: torch.device, dtype: torch.dtype) -> MachineCosts:
    on_gpu = device.type == "cuda"
    near = _ranks_of_a_host(axis, device)
    far = near if near < axis.size else 1
    # Almost nothing; then mostly queries, and mostly pairs.
    shapes = [(16, 16), (16384, 128), (8192, 8192)] if on_gpu else [(16, 16), (2048, 64), (512, 1024)]
    attend = [_attention(T, S, dtype, device) for T, S in shapes]
    message_bytes = 1 << (26 if on_gpu else 22)
    large, small = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (message_bytes, 16))
    halves = large.view(2, 1024, -1)
    order = torch.arange(2048, device=device).flip(0)
    latency_s = _best(lambda: _shift(axis, small, far, axis.size), 8, device)
    far_s = _best(lambda: _shift(axis, large, far, axis.size), 6, device)
    near_s = _best(lambda: _shift(axis, large, 1, near), 6, device) if 1 < near < axis.size else far_s

    def reorder() -> None:
        torch.cat([*halves]).index_select(0, order)

    seconds = [latency_s, far_s, near_s, *_stretches([*attend, reorder], axis, device)]
    latency_s, far_s, near_s, tiny_s, rows_s, pairs_s, copy_s = _slowest(axis, seconds, device)
    carried_s = [max(s - latency_s, 1e-9) for s in (far_s, near_s)]
    # A transfer about as long as the attention beside it.
    beside = large.new_zeros(int(message_bytes * min(4.0, pairs_s / carried_s[0])) + 1)
    own_share = _own_share(axis, beside, far, attend[2], device)
    row_s, pair_s = _rows_and_pairs(shapes[1:], [max(s - tiny_s, 1e-9) for s in (rows_s, pairs_s)])
    costs = MachineCosts(
        flops_per_s=2 * 64 * 7 / pair_s,  # forward 2 products, backward 5
        call_s=tiny_s / 2,
        bytes_per_s=message_bytes / carried_s[0],
        latency_s=latency_s,
        near=near,
        near_bytes_per_s=message_bytes / carried_s[1],
        own_share=_slowest(axis, [own_share], device)[0],
        row_s=row_s / 3,
        copy_bytes_per_s=2 * message_bytes / copy_s,
    )
    if axis.size == 1:
        return costs
    for method in ("ring", "all_gather", "ulysses"):  # ulysses ends in a ring of one
        costs = replace(costs, methods=(*costs.methods, _method(axis, method, costs, dtype, device)))
    return costs


def _method(
    axis: Axis, method: str, costs: MachineCosts, dtype: torch.dtype, device: torch.device
) -> tuple[str, float, float]:
    """Its row of `MachineCosts.methods`: what steps with next to no attention take beyond the formulas."""
    unwritten = replace(costs, methods=(*costs.methods, (method, 0.0, 0.0)))
    heads, beyond_s, written = 2 * axis.size, [], 0.0
    for rows in (16, 16384 if device.type == "cuda" else 1024):
        length = rows * axis.size
        q = torch.zeros(1, rows, heads, 64, dtype=dtype, device=device, requires_grad=True)
        k = q.detach()[:, :, :2].clone().requires_grad_()
        mask = Mask(0, 0, (0, length), (0, length))
        held = tuple(segments_of(length, rank, axis.size, "contiguous") for rank in range(axis.size))
        expected = Expected(Sizes(1, heads, 2, 64, 64, dtype), held, held, mask, unwritten)

        def step(q: Tensor = q, k: Tensor = k) -> None:
            out = ring_attention(q, k, k, axis, layout="contiguous", method=method, window=(0, 0))
            torch.autograd.grad(out, (q, k), out)

        [step_s] = _slowest(axis, [_best(step, 5, device)], device)
        beyond_s.append(step_s - sum(expected.seconds(method)))
        written = sum(expected.written(method))
    small_s, large_s = (max(s, 0.0) for s in beyond_s)
    return method, small_s, max(large_s - small_s, 0.0) / written


def _slowest(axis: Axis, values: list[float], device: torch.device) -> list[float]:
    """For each value the largest that a rank has."""
    if axis.size == 1:
        return values
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone: Tensor = all_gather_start(mine, axis).wait()
    return [float(x) for x in everyone.view(axis.size, -1).amax(0)]


def _attention(T: int, S: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Attention of T queries and S keys that all see each other, forward and backward, as a ring calls it."""
    q, k, dout = (torch.zeros(1, n, _HEADS, 64, dtype=dtype, device=device) for n in (T, S, T))
    mask = Mask(UNBOUNDED, UNBOUNDED, (0, T), (0, S))
    call = Call(Axis.single("cp"), ((Segment(0, T),),), ((Segment(0, S),),), "contiguous", mask, scale=0.125)
    found = call.pieces(0, 0)
    sums = empty_sums(q, q)
    dq, dk, dv = (torch.zeros_like(x, dtype=sums[0].dtype) for x in (q, k, k))

    def run() -> None:
        add_forward(found, q, k, k, sums, call)
        add_backward(found, (q, k, k), (dout, q, sums[1], None), (dq, dk, dv), None, call)

    return run


def _rows_and_pairs(shapes: list[tuple[int, int]], seconds: list[float]) -> tuple[float, float]:
    """Seconds of a query of a head and of a pair: what makes these seconds of two shapes (queries, keys)."""
    (T, S), (t, s) = shapes
    a, b = (each / _HEADS for each in seconds)
    determinant = T * t * (s - S)
    row_s = max((a * t * s - b * T * S) / determinant, 0.0)
    return row_s, max((b - t * row_s) / (t * s), 1e-15)


def _own_share(axis: Axis, x: Tensor, far: int, attend: Callable[[], None], device: torch.device) -> float:
    """How much longer attention takes beside a transfer, for each second of the transfer alone; 0 to 1."""
    if axis.size == 1:
        return 0.0

    def beside() -> None:
        finish = _shift_start(axis, x, far, axis.size)
        attend()
        finish()

    times = zip(
        *(
            [_best(f, 1, device) for f in (attend, lambda: _shift(axis, x, far, axis.size), beside)]
            for _ in range(5)
        ),
        strict=True,
    )
    attend_s, transfer_s, both_s = (min(each) for each in times)
    return min(max((both_s - attend_s) / transfer_s, 0.0), 1.0)


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
    if axis.size > 1:
        _shift_start(axis, x, by, within)()


def _shift_start(axis: Axis, x: Tensor, by: int, within: int) -> Callable[[], None]:
    """Returns what waits for its end."""
    first = axis.rank - axis.rank % within
    to, origin = (first + (axis.rank - first + step) % within for step in (by, -by))
    sent, received = exchange_start([(x, to)], [(torch.empty_like(x), origin)], axis)

    def finish() -> None:
        for handle in (*received, *sent):
            handle.wait()

    return finish


def _stretches(functions: list[Callable[[], None]], axis: Axis, device: torch.device) -> list[float]:
    """Seconds of one call of each, of many in a row on all ranks at once, as ranks may share cores.

    They take turns, and the best row of each counts, as others may disturb.
    """
    best = [float("inf")] * len(functions)
    for _ in range(4):
        for index, function in enumerate(functions):
            _shift(axis, torch.zeros(1, device=device), 1, axis.size)
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < 0.03:
                function()
                count += 1
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            best[index] = min(best[index], (time.perf_counter() - started) / count)
    return best


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
