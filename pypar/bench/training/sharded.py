"""Who trains with states that are cut over two ranks: pypar's ZeRO, torch's FSDP2 and DeepSpeed's ZeRO.

pypar trains its own decoder in its own trainer and, by `pypar.zero` in a script, the plain model that the peers train.
In bf16 all of them keep fp32 masters, compute and gather in bf16, and add gradients up and reduce them in fp32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pypar.bench.training.contenders import Steps, Workload, adamw, clip, plain_model, plain_steps
from pypar.mesh import Mesh
from pypar.owned import Owned
from pypar.train.precision import PRECISIONS

RANKS = 2


@dataclass
class Running:
    """A contender that has begun.

    held    bytes of its states on this rank now, by category
    updates functions of objects, by name, that change what is held outside the layers: reductions, updates
    """

    steps: Iterator[float]
    model: nn.Module
    held: Callable[[], dict[str, int]]
    updates: Sequence[tuple[Any, str]] = ()


Make = Callable[[Path, Workload], Running]


def num_bytes(tensors: Iterable[Any]) -> int:
    """Of the memory behind tensors, each once; of a part of a DTensor, this rank's."""
    found = {}
    for x in tensors:
        if isinstance(x, Tensor):
            storage = getattr(x, "_local_tensor", x).untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _moments(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    return num_bytes(x for each in optimizers for state in each.state.values() for x in state.values())


def _trainer(stage: int, weights: Path, workload: Workload) -> Running:
    trainer = workload.trainer(f"dp={RANKS}", memory={"zero": stage})
    moments = 2 * sum(owned.master.numel() * 4 for owned in trainer.store.owned())

    def steps() -> Iterator[float]:
        while True:
            yield trainer.train_step()["loss"]

    store: Any = trainer.store
    held = store.memory if stage else lambda: _whole(trainer.model, store.owned())
    updates = [(store, "reduce"), (trainer.optimizer, "step"), (store, "publish"), (store, "zero")]
    return Running(steps(), trainer.model, lambda: dict(held()) | {"moments": moments}, updates)


def _whole(model: nn.Module, owned: Sequence[Owned]) -> dict[str, int]:
    """What a store holds that cuts nothing."""
    parameters = num_bytes(model.parameters())
    masters = num_bytes([*model.parameters(), *(each.master for each in owned)]) - parameters
    gradients = num_bytes(each.gradient for each in owned)
    return {"parameters": parameters, "masters": masters, "gradients": gradients}


def _script(stage: int, weights: Path, workload: Workload) -> Running:
    import pypar

    model = plain_model(weights, workload)
    dtype = PRECISIONS[workload.precision]
    store = pypar.zero(model, Mesh(dp=RANKS), stage, dtype=None if dtype == torch.float32 else dtype)
    optimizer = adamw(store.parameters())

    def update() -> None:
        store.clip_grad_norm(1.0)
        optimizer.step()
        store.publish()
        store.zero_grad()

    rank = dist.get_rank()
    steps = plain_steps(
        model, [optimizer], workload, rank=rank, ranks=RANKS, no_sync=store.accumulate, update=update
    )
    updates = [(store, "clip_grad_norm"), (optimizer, "step"), (store, "publish"), (store, "zero_grad")]
    return Running(steps, model, lambda: dict(store.memory()) | {"moments": _moments([optimizer])}, updates)


def _fsdp2(weights: Path, workload: Workload) -> Running:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    model = plain_model(weights, workload)
    dtype = PRECISIONS[workload.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    shards = list(model.parameters())
    optimizer = adamw(shards)

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    def update() -> None:
        clip([p for p in shards if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    def held() -> dict[str, int]:
        whole = [p for p in model.parameters() if not hasattr(p, "_local_tensor")]
        return {
            "parameters": num_bytes(shards),
            "gathered": num_bytes(whole),
            "gradients": num_bytes(p.grad for p in (*shards, *whole)),
            "moments": _moments([optimizer]),
        }

    rank = dist.get_rank()
    steps = plain_steps(model, [optimizer], workload, rank=rank, ranks=RANKS, no_sync=no_sync, update=update)
    return Running(steps, model, held, [(optimizer, "step"), (optimizer, "zero_grad")])


def _deepspeed(stage: int, weights: Path, workload: Workload) -> Running:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank()), "LOCAL_SIZE": str(RANKS)}
    import deepspeed

    model = plain_model(weights, workload)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": workload.sequences // RANKS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": workload.precision == "bf16"},
        "communication_data_type": "fp32",
    }
    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(list(model.parameters())), config=config
    )
    data, sequences, rank = workload.data(), workload.sequences, dist.get_rank()

    def steps() -> Iterator[float]:
        step = 0
        while True:
            tokens, targets, _ = data.train_batch(step * sequences, sequences)
            mine = range(rank * sequences // RANKS, (rank + 1) * sequences // RANKS)
            total = torch.zeros(())
            for row in mine:
                loss = engine(tokens[row : row + 1], targets[row : row + 1])
                engine.backward(loss)  # divides by the number of microbatches
                engine.step()
                total += loss.detach() / len(mine)
            step += 1
            dist.all_reduce(total)
            yield float(total) / RANKS

    return Running(steps(), model, lambda: {"parameters": num_bytes(model.parameters())})


STAGES = (0, 1, 2, 3)
RUNNING: dict[str, Make] = {
    **{f"pypar zero {stage}": partial(_trainer, stage) for stage in STAGES},
    **{f"pypar.zero {stage} of the plain model": partial(_script, stage) for stage in STAGES},
    "torch FSDP2": _fsdp2,
    **{f"DeepSpeed ZeRO-{stage}": partial(_deepspeed, stage) for stage in STAGES[1:]},
}


def _steps(name: str) -> Steps:
    return lambda weights, workload: RUNNING[name](weights, workload).steps


SHARDED: dict[str, tuple[int, Steps]] = {name: (RANKS, _steps(name)) for name in RUNNING}


def missing(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name.startswith("DeepSpeed") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed; pip install 'pypar-torch[peers]' brings it"
    return None
