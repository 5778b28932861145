"""A data-parallel step: torch's DDP over gloo and over "pypar", pypar.DataParallel over "pypar", and no communication.

    python bench/data_parallel.py [--only few-tokens compute-bound] [--network] [--rounds 5] [--steps 6]

Two ranks, each with one thread on a core of its own, run forward, backward and AdamW of one decoder in plain PyTorch
(pypar/bench/plain_llama.py). The contenders take turns in one run; a figure is the median over all steps of the slowest
rank's time. All must compute the same gradients. Beside it:

    busy      the processor's time in a step, of all threads of a rank: what hiding cannot make smaller
    exposed   step - the same step without communication
    alone     the contender's all-reduces with nothing beside them
    hidden    1 - exposed / alone; below zero where communication costs more beside backward than alone, as where its
              processor is the one that computes
    of max    step / max(the step without communication, alone): 1 is the best that hiding can do

--network puts the ranks into two network namespaces with 1 Gbit/s between them, as root.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import pypar
from pypar.bench import namespaces
from pypar.bench.plain_llama import PlainLlama
from pypar.models import DecoderConfig


@dataclass(frozen=True)
class Setting:
    config: DecoderConfig
    sequences: int  # of one rank
    length: int
    limit: float | None = None  # on DDP-over-gloo's step / pypar's, at least


def _decoder(width: int, layers: int, vocab: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        num_heads=width // 64,
        num_kv_heads=width // 128,
        head_size=64,
        d_ff=width * 11 // 4,
    )


SETTINGS = {
    "few-tokens": Setting(_decoder(512, 8, 512), 1, 32, 1.4),
    "compute-bound": Setting(_decoder(512, 8, 512), 2, 512, 1.0),
}
NETWORK_SETTINGS = {
    "network, few-tokens": Setting(_decoder(512, 8, 512), 1, 32),
    "network, compute-bound": Setting(_decoder(512, 8, 512), 3, 512),
}
FLOOR, GLOO, DDP, OURS = "no communication", "DDP, gloo", "DDP, pypar", "pypar.DataParallel"
EXPOSED_SHARE = 0.25  # of DDP-over-gloo's exposed communication, at most, with few tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="settings whose name contains one of these")
    parser.add_argument("--network", action="store_true", help="over 1 Gbit/s between two network namespaces")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--bits-per-second", type=int, default=10**9)
    return parser.parse_args()


class Contender:
    """A model of its own, wrapped."""

    def __init__(self, name: str, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.name, self.group = name, group
        ddp = nn.parallel.DistributedDataParallel
        if name == FLOOR:
            self.model = model
        elif name == OURS:
            self.model = pypar.DataParallel(model, group)
        else:
            self.model = ddp(model, process_group=group, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(tokens, targets).backward()
        self.optimizer.step()

    def all_reduces(self) -> Callable[[], None]:
        """The communication of a step with nothing beside it."""
        cap, flats, left = 25 << 20, [], sum(p.numel() for p in self.model.parameters())
        while left:
            flats.append(torch.zeros(min(left, cap // 4)))
            left -= len(flats[-1])

        def run() -> None:
            for work in [dist.all_reduce(flat, group=self.group, async_op=True) for flat in flats]:
                work.wait()

        return run


def check_gradients(contenders: list[Contender], tokens: Tensor, targets: Tensor) -> None:
    """All the same as the mean of the floor's."""
    floor, *others = contenders
    floor.model(tokens, targets).backward()
    expected = [p.grad.clone() for p in floor.model.parameters()]
    for gradient in expected:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    for other in others:
        other.model(tokens, targets).backward()
        for mean, parameter in zip(expected, other.model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, mean, rtol=1e-4, atol=1e-6)


def seconds(run: Callable[[], None], count: int) -> list[tuple[float, float]]:
    """(wall, processor) of each of `count` calls, on the slowest rank."""
    times = []
    for _ in range(count):
        dist.barrier()
        started, processor = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - started, time.process_time() - processor))
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return [(wall, processor) for wall, processor in slowest.tolist()]


def measure(setting: Setting, groups: dict[str, dist.ProcessGroup | None], arguments: argparse.Namespace):
    """(seconds of a step, its processor's, seconds of its communication alone), by contender."""
    torch.manual_seed(0)
    model = PlainLlama(setting.config)
    contenders = [Contender(name, copy.deepcopy(model), groups[name]) for name in groups]
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (2, setting.sequences, setting.length)
    tokens, targets = torch.randint(setting.config.vocab_size, shape, generator=generator)
    check_gradients(contenders, tokens, targets)
    steps: dict[str, list[float]] = {name: [] for name in groups}
    processor: dict[str, list[float]] = {name: [] for name in groups}
    alone: dict[str, list[float]] = {name: [] for name in groups if name != FLOOR}
    for contender in contenders:  # buckets are rebuilt after the first step
        seconds(lambda c=contender: c.step(tokens, targets), 2)
    for _ in range(arguments.rounds):
        for contender in contenders:
            times = seconds(lambda c=contender: c.step(tokens, targets), arguments.steps)
            steps[contender.name] += [wall for wall, _ in times]
            processor[contender.name] += [busy for _, busy in times]
            if contender.name != FLOOR:
                alone[contender.name] += [wall for wall, _ in seconds(contender.all_reduces(), 2)[1:]]
    return tuple({n: statistics.median(t) for n, t in times.items()} for times in (steps, processor, alone))


def run(rank: int, size: int, store_path: str, arguments: argparse.Namespace) -> None:
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]])
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    if arguments.network:
        namespaces.enter(store, rank, rank * namespaces.NUM_HOSTS // size, arguments.bits_per_second)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ours = dist.new_group(backend="pypar")
    groups = {FLOOR: None, GLOO: dist.new_group(backend="gloo"), DDP: ours, OURS: ours}
    for name, setting in (NETWORK_SETTINGS if arguments.network else SETTINGS).items():
        if not arguments.only or any(word in name for word in arguments.only):
            results = measure(setting, groups, arguments)
            if rank == 0:
                report(name, setting, *results)
    dist.barrier()
    os._exit(0)


def report(
    name: str,
    setting: Setting,
    steps: dict[str, float],
    processor: dict[str, float],
    alone: dict[str, float],
) -> None:
    config = setting.config
    print(
        f"\n{name}: {setting.sequences} x {setting.length} tokens a rank; V {config.vocab_size}, D {config.d_model}, "
        f"{config.num_layers} layers; torch {torch.__version__}"
    )
    print("| contender | step, ms | busy, ms | x DDP, gloo | exposed, ms | alone, ms | hidden | of max |")
    print("|---|---|---|---|---|---|---|---|")
    floor = steps[FLOOR]
    for contender, step in steps.items():
        ratio, busy = steps[GLOO] / step, processor[contender]
        if contender == FLOOR:
            print(f"| {contender} | {step * 1e3:.1f} | {busy * 1e3:.1f} | {ratio:.2f} | | | | |")
            continue
        exposed, time_alone = step - floor, alone[contender]
        print(
            f"| {contender} | {step * 1e3:.1f} | {busy * 1e3:.1f} | {ratio:.2f} | {exposed * 1e3:.1f} "
            f"| {time_alone * 1e3:.1f} | {1 - exposed / time_alone:.0%} | {step / max(floor, time_alone):.2f} |",
            flush=True,
        )
    if setting.limit is not None:
        share = (steps[OURS] - floor) / (steps[GLOO] - floor)
        print(
            f"{OURS} against {GLOO}: {steps[GLOO] / steps[OURS]:.2f}x, asked {setting.limit}x; exposed "
            f"{share:.2f} of its" + (f", asked at most {EXPOSED_SHARE}" if setting.limit > 1 else ""),
            flush=True,
        )


def main() -> None:
    arguments = parse_arguments()
    if arguments.network and (reason := namespaces.why_not()):
        sys.exit(f"--network was asked for, but {reason}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (2, str(Path(folder) / "store"), arguments), nprocs=2)


if __name__ == "__main__":
    main()
