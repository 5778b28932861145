"""Step time of ring attention beside one process that has the whole sequence, on one machine, in one run.

    python bench/context_parallel.py [--ranks 2] [--lengths 4096 8192] [--rounds 3] [--full] [--bf16]

One step is forward and backward of attention: B 1, N 8, G 2, H 64. The ring runs on --ranks processes of one
thread over gloo; the single process has as many threads. Contenders take turns and the figure is the median
of all rounds. "ideal" is pypar.attention in the single process: a ring that costs nothing would reach it.
"peer" is PyTorch's own scaled_dot_product_attention there. First the ring's output and gradients are checked
against the single process.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pypar
from pypar.context_parallel import ring_attention, shard, unshard
from pypar.mesh import Axis

N, G, H = 8, 2, 64


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, H, generator=generator).to(dtype) for heads in (N, G, G, N)]


def step(attend: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)."""
    *leaves, dout = tensors
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def check(ours: list[Tensor], theirs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert error <= allowed, f"{name} of the ring differs from the single process by {error:.2g}"


def run_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    if args.ranks <= (os.cpu_count() or 1):
        os.sched_setaffinity(0, {rank})
    store = dist.FileStore(str(Path(folder) / "store"), args.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    axis = Axis.of(dist.group.WORLD, "cp")
    dtype, causal = torch.bfloat16 if args.bf16 else torch.float32, not args.full
    if rank == 0:
        print(
            f"{args.ranks} ranks, {dtype}, {'causal' if causal else 'full'}; times in ms, forward + backward"
        )
        print(
            f"{'length':>7} {'layout':<11} {'ring':>8} {'ideal':>8} {'peer':>8} {'of ideal':>9} "
            f"{'waiting':>8}"
        )
    for length in args.lengths:
        for layout in ("contiguous", "zigzag"):
            figures = measure(axis, length, layout, dtype, causal, args.rounds)
            if rank == 0:
                ring_s, ideal_s, peer_s, waiting = figures
                print(
                    f"{length:>7} {layout:<11} {ring_s * 1e3:>8.0f} {ideal_s * 1e3:>8.0f} "
                    f"{peer_s * 1e3:>8.0f}"
                    f" {ideal_s / ring_s:>9.0%} {waiting:>8.1%}",
                    flush=True,
                )


def measure(
    axis: Axis, length: int, layout: str, dtype: torch.dtype, causal: bool, rounds: int
) -> tuple[float, float, float, float]:
    """Seconds of ring, single process and PyTorch; share of the time that rank 0 waited."""
    whole = inputs(length, dtype)
    parts = [shard(x, 1, axis, layout) for x in whole]

    def ring() -> tuple[Tensor, ...]:
        return step(lambda q, k, v: ring_attention(q, k, v, axis, layout=layout, causal=causal), parts)

    gathered = [unshard(x, 1, axis, layout) for x in ring()]
    if axis.rank == 0:
        check(
            gathered, alone(axis, lambda: step(lambda *t: pypar.attention(*t, causal=causal), whole)), dtype
        )
        alone(axis, lambda: step(lambda *t: torch_attention(*t, causal), whole))
    times: dict[str, list[float]] = {"ring": [], "ideal": [], "peer": [], "waiting": []}
    for _ in range(rounds):
        dist.barrier()
        waited = axis.traffic.wait_seconds
        times["ring"].append(timed(lambda: (ring(), dist.barrier())))
        times["waiting"].append(axis.traffic.wait_seconds - waited)
        if axis.rank == 0:
            ideal = alone(
                axis, lambda: timed(lambda: step(lambda *t: pypar.attention(*t, causal=causal), whole))
            )
            peer = alone(axis, lambda: timed(lambda: step(lambda *t: torch_attention(*t, causal), whole)))
            times["ideal"].append(ideal)
            times["peer"].append(peer)
        dist.barrier()  # the other ranks sleep in this one while rank 0 has the machine
    ring_s, ideal_s, peer_s, waited = (statistics.median(times[name] or [0.0]) for name in times)
    return ring_s, ideal_s, peer_s, waited / ring_s


def alone(axis: Axis, function: Callable[[], object]):
    """Runs with a thread for each rank, on all cores; the caller sees to it that the other ranks sleep."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    torch.set_num_threads(axis.size)
    try:
        return function()
    finally:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (args, folder), args.ranks)


if __name__ == "__main__":
    main()
