"""Training speed of pypar's layouts beside plain PyTorch's, on one machine, in one run.

    python bench/train.py [--steps 4] [--rounds 2] [--only NAME ...]

Every contender trains the same decoder (24.1 M parameters: V 512, D 512, 8 layers, N 8, G 4, F 1408) in fp32 on
the same text, 8 sequences of 1,024 tokens a step, one sequence a microbatch, AdamW (fused), each rank pinned to its
share of the cores. Each launch makes one warm-up step; the figure is the median over all timed steps of all rounds.
Contenders take turns, so a machine that drifts drifts for all. All of them must report the same losses.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pypar.bench.plain_llama import PlainLlama
from pypar.bench.timing import median_seconds
from pypar.blocks import global_parameters
from pypar.mesh import Mesh, parse_mesh
from pypar.models import DecoderConfig
from pypar.ops import linear
from pypar.train.config import RunConfig
from pypar.train.data.windows import open_data
from pypar.train.metrics import matmul_rate
from pypar.train.trainer import Trainer

SEQUENCES, LENGTH, LR = 8, 1024, 3e-4
SIZES = DecoderConfig(
    vocab_size=512, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, head_size=64, d_ff=1408
)


def run_config(mesh: str, *, sequence_parallel: bool = False) -> RunConfig:
    return RunConfig.from_dict(
        {
            "name": "bench",
            "mesh": mesh,
            "data": {"path": "python-stdlib"},
            "model": {
                "vocab_size": SIZES.vocab_size,
                "num_layers": SIZES.num_layers,
                "d_model": SIZES.d_model,
                "num_heads": SIZES.num_heads,
                "num_kv_heads": SIZES.num_kv_heads,
                "d_ff": SIZES.d_ff,
            },
            "optimizer": {
                "lr": LR,
                "warmup_steps": 0,
                "min_lr_ratio": 1.0,
                "clip_norm": 1.0,
                "weight_decay": 0.1,
            },
            "train": {
                "steps": 1000,
                "batch_size": SEQUENCES,
                "microbatch_size": 1,
                "sequence_length": LENGTH,
                "sequence_parallel": sequence_parallel,
            },
        }
    )


def pypar_steps(mesh: str, **options: bool) -> Iterator[float]:
    trainer = Trainer(run_config(mesh, **options), Mesh.of(parse_mesh(mesh)), torch.device("cpu"))
    while True:
        yield trainer.train_step()["loss"]


def save_initial_weights(path: Path) -> None:
    """pypar's initial weights, so that every contender starts alike and the losses can be compared."""
    trainer = Trainer(run_config(""), Mesh(), torch.device("cpu"))
    torch.save({name: p.detach() for name, p in global_parameters(trainer.model)}, path)


def plain_model(weights: Path) -> PlainLlama:
    model = PlainLlama(SIZES)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def plain_steps(
    model: torch.nn.Module, optimizers: list, rank: int, ranks: int, *, no_sync: Callable | None = None
) -> Iterator[float]:
    """The usual loop: microbatches of one sequence, gradients accumulated, clipped by norm, AdamW."""
    config = run_config("")
    data = open_data(config.data, LENGTH, config.seed)
    step = 0
    while True:
        tokens, targets, _ = data.train_batch(step * SEQUENCES, SEQUENCES)
        mine = range(rank * SEQUENCES // ranks, (rank + 1) * SEQUENCES // ranks)
        total = torch.zeros(())
        for row in mine:
            last = row == mine[-1]
            with torch.enable_grad() if last or no_sync is None else no_sync():
                loss = model(tokens[row : row + 1], targets[row : row + 1]) / len(mine)
                loss.backward()
            total += loss.detach()
        clip(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if ranks > 1:
            dist.all_reduce(total)
        yield float(total) / ranks


def clip(model: torch.nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return
    gradients = [p.grad.to_local() if isinstance(p, DTensor) else p.grad for p in parameters]
    split = [g.square().sum() for g, p in zip(gradients, parameters, strict=True) if isinstance(p, DTensor)]
    whole = [
        g.square().sum() for g, p in zip(gradients, parameters, strict=True) if not isinstance(p, DTensor)
    ]
    squares: Tensor = torch.stack(split).sum()
    dist.all_reduce(squares)
    scale = (1.0 / (squares + sum(whole)).sqrt()).clamp(max=1.0)
    torch._foreach_mul_(gradients, float(scale))


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=(0.9, 0.95), fused=True)


def torch_single(weights: Path) -> Iterator[float]:
    model = plain_model(weights)
    return plain_steps(model, [adamw(list(model.parameters()))], 0, 1)


def torch_ddp(weights: Path) -> Iterator[float]:
    model = torch.nn.parallel.DistributedDataParallel(plain_model(weights), gradient_as_bucket_view=True)
    optimizers = [adamw(list(model.parameters()))]
    return plain_steps(model, optimizers, dist.get_rank(), dist.get_world_size(), no_sync=model.no_sync)


def torch_tp(weights: Path) -> Iterator[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = plain_model(weights)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {f"attention.{n}": ColwiseParallel() for n in "qkv"} | {"attention.out": RowwiseParallel()}
    plan |= {f"feed_forward.{n}": ColwiseParallel() for n in ("gate", "up")} | {
        "feed_forward.down": RowwiseParallel()
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    steps = plain_steps(model, [adamw(split), adamw(whole)], 0, 1)
    return steps


CONTENDERS: dict[str, tuple[int, Callable[[Path], Iterator[float]]]] = {
    "torch, one process": (1, torch_single),
    "torch DDP": (2, torch_ddp),
    "torch DTensor tp": (2, torch_tp),
    "pypar, one process": (1, lambda _: pypar_steps("")),
    "pypar dp=2": (2, lambda _: pypar_steps("dp=2")),
    "pypar tp=2": (2, lambda _: pypar_steps("tp=2")),
    "pypar tp=2 sequence parallel": (2, lambda _: pypar_steps("tp=2", sequence_parallel=True)),
    "pypar pp=2": (2, lambda _: pypar_steps("pp=2")),
    "pypar cp=2": (2, lambda _: pypar_steps("cp=2")),
}


def rank_main(rank: int, name: str, num_steps: int, directory: str) -> None:
    ranks, make = CONTENDERS[name]
    cores = sorted(os.sched_getaffinity(0))
    own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] or cores
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
    if ranks > 1:
        store = dist.FileStore(f"{directory}/store", ranks)
        dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    steps = make(Path(directory, "weights"))
    losses, seconds = [next(steps)], []
    for _ in range(num_steps):
        if ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        losses.append(next(steps))
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        torch.save((losses, seconds), f"{directory}/result")
    if ranks > 1:
        dist.barrier()
    os._exit(0)  # some peers' processes hang or abort in their exit handlers: not what is measured


def launch(name: str, num_steps: int) -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as directory:
        save_initial_weights(Path(directory, "weights"))
        mp.spawn(rank_main, (name, num_steps, directory), nprocs=CONTENDERS[name][0])
        return torch.load(Path(directory, "result"), weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps a launch")
    parser.add_argument("--rounds", type=int, default=2, help="launches of each contender")
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    options = parser.parse_args()
    names = [n for n in CONTENDERS if not options.only or any(word in n for word in options.only)]
    run_config_data = run_config("")
    open_data(
        run_config_data.data, LENGTH, run_config_data.seed
    )  # tokenised once, before any rank asks for it
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name in names:
            losses[name], timed = launch(name, options.steps)
            seconds[name] += timed
            print(f"  {name}: {', '.join(f'{s:.2f}' for s in timed)} s", file=sys.stderr)
    first = losses[names[0]]
    for name in names:
        torch.testing.assert_close(losses[name], first, rtol=1e-4, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    report(seconds)


def linear_gain() -> str:
    """What the choice of a matmul library gains: pypar's linear against torch's at the size of one layer."""
    x, weight = torch.randn(LENGTH, SIZES.d_model), torch.randn(SIZES.d_ff, SIZES.d_model)
    functions = {"ours": linear, "torch": torch.nn.functional.linear}
    contenders = {name: functools.partial(function, x, weight) for name, function in functions.items()}
    seconds = median_seconds(contenders, rounds=30)
    size = f"[{LENGTH}, {SIZES.d_model}] x [{SIZES.d_model}, {SIZES.d_ff}]"
    return f"pypar.ops.linear against torch's, forward of {size}: {seconds['torch'] / seconds['ours']:.2f}x"


def report(seconds: dict[str, list[float]]) -> None:
    rate = {name: SEQUENCES * LENGTH / statistics.median(s) for name, s in seconds.items()}
    peers = [r for name, r in rate.items() if name.startswith("torch")]
    flops = SIZES.flops_per_token(LENGTH)
    peak = matmul_rate(torch.float32, torch.device("cpu"), 2048)
    cores = len(os.sched_getaffinity(0))
    print(
        f"torch {torch.__version__}, {cores} cores, fp32 matmul {peak / 1e9:.0f} GFLOP/s with "
        f"{torch.get_num_threads()} threads"
    )
    print(linear_gain())
    print("| contender | tokens/s | GFLOP/s | of matmul | x best torch | spread |\n|---|---|---|---|---|---|")
    for name, tokens_per_s in rate.items():
        spread = (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name])
        ratio = f"{tokens_per_s / max(peers):.2f}" if peers else "-"
        work = tokens_per_s * flops
        print(
            f"| {name} | {tokens_per_s:,.0f} | {work / 1e9:.0f} | {work / peak:.0%} | {ratio} "
            f"| {spread:.0%} |"
        )


if __name__ == "__main__":
    main()
