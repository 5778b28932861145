"""Who trains: pypar's layouts, and the same decoder in plain PyTorch, by itself, compiled, under DDP, cut by DTensor.

All of them train 24.1 M parameters (V 512, D 512, 8 layers, N 8, G 4, F 1408) on the same text, 8 sequences of 1,024
tokens a step, one sequence a microbatch, with fused AdamW, from the same weights. In bf16, pypar's weights and
activations are bf16 beside fp32 masters; plain PyTorch's weights are fp32 under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.bench.plain_llama import PlainLlama
from pypar.blocks import global_parameters
from pypar.mesh import Mesh, parse_mesh
from pypar.models import DecoderConfig
from pypar.train.config import RunConfig
from pypar.train.data.windows import open_data
from pypar.train.precision import PRECISIONS
from pypar.train.trainer import Trainer

SEQUENCES, LENGTH, LR = 8, 1024, 3e-4
SIZES = DecoderConfig(
    vocab_size=512, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, head_size=64, d_ff=1408
)


def run_config(mesh: str, precision: str = "fp32", *, sequence_parallel: bool = False) -> RunConfig:
    model = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
    return RunConfig.from_dict(
        {
            "name": "bench",
            "mesh": mesh,
            "data": {"path": "python-stdlib"},
            "model": {name: getattr(SIZES, name) for name in model},
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
                "precision": precision,
            },
        }
    )


def prepare_data() -> None:
    """Tokenised once, before any rank asks for it."""
    config = run_config("")
    open_data(config.data, LENGTH, config.seed)


def save_initial_weights(path: Path) -> None:
    """pypar's initial weights, so that every contender starts alike and the losses can be compared."""
    trainer = Trainer(run_config(""), Mesh(), torch.device("cpu"))
    torch.save({name: p.detach() for name, p in global_parameters(trainer.model)}, path)


# What a contender is made of: the file of the weights, the precision. What it makes: the loss of each step.
Steps = Callable[[Path, str], Iterator[float]]


def _pypar(mesh: str, *, sequence_parallel: bool = False) -> Steps:
    def steps(weights: Path, precision: str) -> Iterator[float]:
        config = run_config(mesh, precision, sequence_parallel=sequence_parallel)
        trainer = Trainer(config, Mesh.of(parse_mesh(mesh)), torch.device("cpu"))
        while True:
            yield trainer.train_step()["loss"]

    return steps


def _plain_model(weights: Path) -> PlainLlama:
    model = PlainLlama(SIZES)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def _plain_steps(
    model: Callable[[Tensor, Tensor], Tensor],
    optimizers: list[torch.optim.Optimizer],
    precision: str,
    *,
    rank: int = 0,
    ranks: int = 1,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
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
            with nullcontext() if row == mine[-1] else no_sync():
                with torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "fp32"):
                    loss = model(tokens[row : row + 1], targets[row : row + 1]) / len(mine)
                loss.backward()
            total += loss.detach()
        _clip([p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if ranks > 1:
            dist.all_reduce(total)
        yield float(total) / ranks


def _clip(parameters: list[Tensor]) -> None:
    from torch.distributed.tensor import DTensor

    split = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    if not split:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    squares = torch.stack([g.square().sum() for g in split]).sum()
    dist.all_reduce(squares)
    squares += torch.stack([g.square().sum() for g in whole]).sum()
    torch._foreach_mul_([*split, *whole], float((1.0 / squares.sqrt()).clamp(max=1.0)))


def _adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=(0.9, 0.95), fused=True)


def _torch(weights: Path, precision: str) -> Iterator[float]:
    model = _plain_model(weights)
    return _plain_steps(model, [_adamw(list(model.parameters()))], precision)


def _torch_compiled(weights: Path, precision: str) -> Iterator[float]:
    model = _plain_model(weights)
    compiled = torch.compile(model)
    return _plain_steps(compiled, [_adamw(list(model.parameters()))], precision)


def _torch_ddp(weights: Path, precision: str) -> Iterator[float]:
    model = torch.nn.parallel.DistributedDataParallel(_plain_model(weights), gradient_as_bucket_view=True)
    optimizers = [_adamw(list(model.parameters()))]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return _plain_steps(model, optimizers, precision, rank=rank, ranks=ranks, no_sync=model.no_sync)


def _torch_tp(weights: Path, precision: str) -> Iterator[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.parallel.style import ParallelStyle

    model = _plain_model(weights)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, ParallelStyle] = {f"attention.{n}": ColwiseParallel() for n in "qkv"}
    plan |= {"attention.out": RowwiseParallel()}
    plan |= {f"feed_forward.{n}": ColwiseParallel() for n in ("gate", "up")}
    plan |= {"feed_forward.down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    return _plain_steps(model, [_adamw(split), _adamw(whole)], precision)


# Names that start with "torch" are the peers.
CONTENDERS: dict[str, tuple[int, Steps]] = {
    "torch, one process": (1, _torch),
    "torch.compile, one process": (1, _torch_compiled),
    "torch DDP": (2, _torch_ddp),
    "torch DTensor tp": (2, _torch_tp),
    "pypar, one process": (1, _pypar("")),
    "pypar dp=2": (2, _pypar("dp=2")),
    "pypar tp=2": (2, _pypar("tp=2")),
    "pypar tp=2 sequence parallel": (2, _pypar("tp=2", sequence_parallel=True)),
    "pypar pp=2": (2, _pypar("pp=2")),
    "pypar cp=2": (2, _pypar("cp=2")),
}
