"""A training run from start to end: join the job, step through it, write what the user reads."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pypar.comm.backend import BACKENDS
from pypar.mesh import Mesh, parse_mesh
from pypar.train import checkpoint
from pypar.train.config import RunConfig
from pypar.train.generate import generate, printable
from pypar.train.launch import joined_world_size
from pypar.train.metrics import FLOP_CONVENTION, Metrics, draw_loss_curve, matmul_rate
from pypar.train.precision import PRECISIONS
from pypar.train.trainer import Trainer


@contextlib.contextmanager
def process_group(threads: int) -> Iterator[torch.device]:
    """Joins the job that torchrun (or ``pypar train``) started, if any; yields this rank's device."""
    world_size = joined_world_size() or 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if world_size > 1:
        dist.init_process_group(BACKENDS[device.type])
    yield device
    if (
        world_size > 1
    ):  # not after an exception: the agent ends the ranks, and closing a group can wait for them
        dist.destroy_process_group()


def run(config: RunConfig) -> None:
    """Train as ``config`` says, from the checkpoint that it names, if any; writes <directory>/<name>/."""
    with process_group(config.train.threads) as device:
        sizes: Any = parse_mesh(config.mesh)
        mesh = Mesh(**sizes, device_type=device.type)
        trainer = Trainer(config, mesh, device)
        saved = _train(trainer, writes=mesh.world.rank == 0)
    entropies = trainer.data.validation_entropies() if mesh.world.rank == 0 else {}
    del trainer  # the sample loads the model anew
    if mesh.world.rank == 0:
        _report(config, entropies, saved)


def _train(trainer: Trainer, *, writes: bool) -> Path:
    config = trainer.config
    directory = config.run_directory
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
    with contextlib.closing(metrics):
        _steps(trainer, metrics)
    saved = trainer.save(config.checkpoint_directory)
    if writes:
        checkpoint.keep_newest(config.checkpoint_directory, config.train.keep_checkpoints)
    return saved


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
    (rate,) = trainer.sum_over_world(matmul_rate(PRECISIONS[train.precision], trainer.device))
    tokens = train.batch_size * train.sequence_length
    flops = tokens * trainer.model_config.flops_per_token(train.sequence_length)
    metrics.say(
        f"MFU: {FLOP_CONVENTION}; peak: {rate / 1e9:.0f} GFLOP/s, a {train.precision} matmul on every rank at once"
    )
    while trainer.step < train.steps:
        for axis in trainer.axes:
            axis.traffic.reset()
        start = time.perf_counter()
        line: dict[str, object] = dict(trainer.train_step())
        seconds = time.perf_counter() - start
        line |= {
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / rate,
            "wait_share": sum(axis.traffic.wait_seconds for axis in trainer.axes) / seconds,
            "bytes_sent": {axis.name: axis.traffic.bytes_sent for axis in trainer.axes if axis.size > 1},
        }
        last = trainer.step == train.steps
        if last:
            line["val_loss"] = trainer.evaluate(train.final_evaluate_batches)
        elif train.evaluate_every and trainer.step % train.evaluate_every == 0:
            line["val_loss"] = trainer.evaluate(train.evaluate_batches)
        metrics.write(line, show=trainer.step % train.log_every == 0 or trainer.step == 1 or last)
        if train.checkpoint_every and trainer.step % train.checkpoint_every == 0 and not last:
            trainer.save(directory)
            checkpoint.keep_newest(directory, train.keep_checkpoints)


def _report(config: RunConfig, entropies: Mapping[str, float], saved: Path) -> None:
    """What the user came for: validation loss beside the text's entropies, a picture, a sample."""
    train, directory = config.train, config.run_directory
    lines = Metrics.read(directory / "metrics.jsonl")
    levels = {f"{name} entropy": value for name, value in entropies.items()}
    draw_loss_curve(lines, levels, directory / "loss.png")
    compared = ", ".join(f"{name} {value:.3f}" for name, value in levels.items())
    print(f"validation loss {lines[-1]['val_loss']:.4f} nats a token ({compared} of the same text)")
    if train.sample_tokens:
        text = generate(saved, train.sample_prompt, train.sample_tokens, seed=config.seed)
        (directory / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"sample:\n{printable(text, train.sample_prompt)}\n")
    for what, path in (
        ("checkpoint", saved),
        ("loss curve", directory / "loss.png"),
        ("metrics", directory / "metrics.jsonl"),
    ):
        print(f"{what:<11}{path}")
