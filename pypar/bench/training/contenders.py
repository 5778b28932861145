"""Who trains: pypar's layouts, and the same decoder in plain PyTorch, by itself, compiled, under DDP, cut by DTensor.

All of them train what a `Workload` says with fused AdamW, from the same weights. In bf16, pypar's weights and
activations are bf16 beside fp32 masters; plain PyTorch's weights are fp32 under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.bench.plain_llama import PlainLlama
from pypar.blocks import global_parameters
from pypar.mesh import Mesh, parse_mesh
from pypar.models import DecoderConfig
from pypar.train.config import RunConfig
from pypar.train.data.windows import TokenData, open_data
from pypar.train.precision import PRECISIONS
from pypar.train.trainer import Trainer

LR = 3e-4
SIZES = DecoderConfig(
    vocab_size=512, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, head_size=64, d_ff=1408
)


@dataclass(frozen=True)
class Workload:
    """What is trained: by default 24.1 M parameters (V 512, D 512, 8 layers, N 8, G 4, F 1408).

    The text is that of Python's own library; a step has ``sequences`` of ``length`` tokens, one sequence a microbatch.
    """

    precision: str = "fp32"
    sequences: int = 8
    length: int = 1024
    sizes: DecoderConfig = SIZES

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.length

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return self.tokens * self.sizes.flops_per_token(self.length)

    def config(self, mesh: str = "", **sections: dict[str, object]) -> RunConfig:
        """The run that trains it; ``sections`` add to its configuration."""
        model = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_size", "d_ff")
        run: dict[str, Any] = {
            "name": "bench",
            "mesh": mesh,
            "data": {"path": "python-stdlib"},
            "model": {name: getattr(self.sizes, name) for name in model},
            "optimizer": {
                "lr": LR,
                "warmup_steps": 0,
                "min_lr_ratio": 1.0,
                "clip_norm": 1.0,
                "weight_decay": 0.1,
            },
            "train": {
                "steps": 1000,
                "batch_size": self.sequences,
                "microbatch_size": 1,
                "sequence_length": self.length,
                "precision": self.precision,
            },
        }
        for name, values in sections.items():
            run[name] = run.get(name, {}) | values
        return RunConfig.from_dict(run)

    def data(self) -> TokenData:
        config = self.config()
        return open_data(config.data, self.length, config.seed)

    def trainer(self, mesh: str = "", **sections: dict[str, object]) -> Trainer:
        return Trainer(self.config(mesh, **sections), Mesh.of(parse_mesh(mesh)), torch.device("cpu"))

    def save_initial_weights(self, path: Path) -> None:
        """pypar's initial weights, so that every contender starts alike and the losses can be compared."""
        torch.save({name: p.detach() for name, p in global_parameters(self.trainer().model)}, path)


# What a contender is made of: the file of the weights, what it trains. What it makes: the loss of each step.
Steps = Callable[[Path, Workload], Iterator[float]]


def _pypar(mesh: str, **sections: dict[str, object]) -> Steps:
    def steps(weights: Path, workload: Workload) -> Iterator[float]:
        trainer = workload.trainer(mesh, **sections)
        while True:
            yield trainer.train_step()["loss"]

    return steps


def plain_model(weights: Path, workload: Workload) -> PlainLlama:
    model = PlainLlama(workload.sizes)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def plain_steps(
    model: Callable[[Tensor, Tensor], Tensor],
    optimizers: list[torch.optim.Optimizer],
    workload: Workload,
    *,
    rank: int = 0,
    ranks: int = 1,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    update: Callable[[], None] | None = None,
) -> Iterator[float]:
    """The usual loop: microbatches of one sequence, gradients accumulated, clipped by norm, AdamW.

    update: in place of the last three, for a model that also says itself in what precision it computes.
    """
    data, sequences, dtype = workload.data(), workload.sequences, PRECISIONS[workload.precision]
    step = 0
    while True:
        tokens, targets, _ = data.train_batch(step * sequences, sequences)
        mine = range(rank * sequences // ranks, (rank + 1) * sequences // ranks)
        total = torch.zeros(())
        for row in mine:
            with nullcontext() if row == mine[-1] else no_sync():
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and update is None):
                    loss = model(tokens[row : row + 1], targets[row : row + 1]) / len(mine)
                loss.backward()
            total += loss.detach()
        if update is not None:
            update()
        else:
            clip([p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        if ranks > 1:
            dist.all_reduce(total)
        yield float(total) / ranks


def clip(parameters: list[Tensor]) -> None:
    """Clip by the norm of all gradients, some of which may be cut over all ranks."""
    from torch.distributed.tensor import DTensor

    split = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    if not split:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    squares = torch.stack([g.square().sum() for g in split]).sum()
    dist.all_reduce(squares)
    squares += sum(g.square().sum() for g in whole)
    torch._foreach_mul_([*split, *whole], float((1.0 / squares.sqrt()).clamp(max=1.0)))


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=(0.9, 0.95), fused=True)


def _torch(weights: Path, workload: Workload) -> Iterator[float]:
    model = plain_model(weights, workload)
    return plain_steps(model, [adamw(list(model.parameters()))], workload)


def _torch_compiled(weights: Path, workload: Workload) -> Iterator[float]:
    model = plain_model(weights, workload)
    compiled = torch.compile(model)
    return plain_steps(compiled, [adamw(list(model.parameters()))], workload)


def _torch_ddp(weights: Path, workload: Workload) -> Iterator[float]:
    model = torch.nn.parallel.DistributedDataParallel(
        plain_model(weights, workload), gradient_as_bucket_view=True
    )
    optimizers = [adamw(list(model.parameters()))]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return plain_steps(model, optimizers, workload, rank=rank, ranks=ranks, no_sync=model.no_sync)


def _torch_tp(weights: Path, workload: Workload) -> Iterator[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.parallel.style import ParallelStyle

    model = plain_model(weights, workload)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, ParallelStyle] = {f"attention.{n}": ColwiseParallel() for n in "qkv"}
    plan |= {"attention.out": RowwiseParallel()}
    plan |= {f"feed_forward.{n}": ColwiseParallel() for n in ("gate", "up")}
    plan |= {"feed_forward.down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    return plain_steps(model, [adamw(split), adamw(whole)], workload)


# Names that start with "torch" are the peers.
CONTENDERS: dict[str, tuple[int, Steps]] = {
    "torch, one process": (1, _torch),
    "torch.compile, one process": (1, _torch_compiled),
    "torch DDP": (2, _torch_ddp),
    "torch DTensor tp": (2, _torch_tp),
    "pypar, one process": (1, _pypar("")),
    "pypar dp=2": (2, _pypar("dp=2")),
    "pypar tp=2": (2, _pypar("tp=2")),
    "pypar tp=2 sequence parallel": (2, _pypar("tp=2", train={"sequence_parallel": True})),
    "pypar pp=2": (2, _pypar("pp=2")),
    "pypar cp=2": (2, _pypar("cp=2")),
}
