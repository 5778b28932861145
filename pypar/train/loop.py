"""The loop of a run: from its checkpoint, if any, through its steps to the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from pypar.data_parallel.chunks.places import Chunks
from pypar.data_parallel.zero import Zero
from pypar.mesh import Mesh
from pypar.optimizers.on_disk import OnDisk
from pypar.train import checkpoint
from pypar.train.metrics import FLOP_CONVENTION, Metrics, matmul_rate

if TYPE_CHECKING:
    from pypar.train.trainer import Trainer


def fit(trainer: Trainer) -> Path:
    """Train to the configured step and return the last checkpoint; the first rank writes <directory>/<name>/."""
    config = trainer.config
    directory, writes = config.run_directory, trainer.mesh.world.rank == 0
    resume_from = _agreed(config.resume_path(), trainer.mesh)
    if resume_from is not None:
        changes = trainer.load(resume_from)
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    metrics = Metrics(directory if writes else None, config.train.steps, trainer.step)
    if resume_from is not None:
        metrics.say(f"resumed from {resume_from} at step {trainer.step}, after {trainer.samples:,} samples")
        for line in changes:
            metrics.say(f"resumed with {line}")
    if isinstance(trainer.optimizer.update, OnDisk):
        metrics.say(f"optimizer states: {trainer.optimizer.update.way}")
    with contextlib.closing(metrics):
        _steps(trainer, metrics)
    saved = trainer.save()
    checkpoint.keep_newest(config.checkpoint_directory, config.train.keep_checkpoints)
    return saved


def _say_placement(trainer: Trainer, metrics: Metrics, told: int) -> int:
    """Say where chunks lie once that is known, and each time that it changes; how often it has been."""
    places = trainer.store.places if isinstance(trainer.store, Zero) else None
    if not isinstance(places, Chunks) or places.num_plans == told:
        return told
    for line in places.lines():
        metrics.say(line)
    return places.num_plans


def _agreed(path: Path | None, mesh: Mesh) -> Path | None:
    """Rank 0's path: file systems of several nodes may show a new checkpoint at different times."""
    if mesh.world.size == 1:
        return path
    paths = [path]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def _steps(trainer: Trainer, metrics: Metrics) -> None:
    train, directory = trainer.config.train, trainer.config.checkpoint_directory
    trainer.sum_over_world(0.0)  # so that all ranks measure at once: they may share cores
    (rate,) = trainer.sum_over_world(matmul_rate(trainer.dtype, trainer.device))
    tokens = train.batch_size * train.sequence_length
    flops = tokens * trainer.flops_per_token
    metrics.say(
        f"MFU: {FLOP_CONVENTION}; peak: {rate / 1e9:.0f} GFLOP/s, a {train.precision} matmul on every rank at once"
    )
    num_placements = 0
    while trainer.step < train.steps:
        for axis in trainer.axes:
            axis.traffic.reset()
        start = time.perf_counter()
        line: dict[str, object] = dict(trainer.train_step())
        seconds = time.perf_counter() - start
        num_placements = _say_placement(trainer, metrics, num_placements)
        line |= {
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / rate,
            "wait_share": sum(axis.traffic.wait_seconds for axis in trainer.axes) / seconds,
            "bytes_sent": {axis.name: axis.traffic.bytes_sent for axis in trainer.axes if axis.size > 1},
        }
        is_update = not line.get(
            "skipped"
        )  # else the step before it has had its evaluation and its checkpoint
        last = trainer.step == train.steps
        if last:
            line["val_loss"] = trainer.evaluate(train.final_evaluate_batches)
        elif is_update and train.evaluate_every and trainer.step % train.evaluate_every == 0:
            line["val_loss"] = trainer.evaluate()
        is_shown = not is_update or trainer.step % train.log_every == 0 or trainer.step == 1 or last
        metrics.write(line, show=is_shown)
        if is_update and train.checkpoint_every and trainer.step % train.checkpoint_every == 0 and not last:
            trainer.save()
            checkpoint.keep_newest(directory, train.keep_checkpoints)
