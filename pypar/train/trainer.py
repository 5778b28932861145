"""The training run of one rank: build the model on the mesh, step, evaluate, save, resume."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ..comm import all_reduce_start
from ..data_parallel import GradientBuckets
from ..mesh import Axis, Mesh, parse_mesh
from ..models import Decoder
from ..pipeline_parallel import PipelineRuntime, schedules
from . import checkpoint
from .batch import TrainingStage, split_batch
from .config import RunConfig
from .data import open_data
from .generate import generate
from .gradients import PartialGradients, tied_embedding_axis
from .metrics import FLOP_CONVENTION, Metrics, draw_loss_curve, matmul_rate
from .optimizer import Optimizer, learning_rate

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """One rank's share of a run; all its state is a function of (config, step), so any layout resumes any other."""

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.data = open_data(config.data, config.train.sequence_length, config.seed)
        dtype = PRECISIONS[config.train.precision]
        self.model_config = config.decoder_config(self.data.vocab_size)
        self.model = Decoder(
            self.model_config,
            mesh,
            sequence_parallel=config.train.sequence_parallel,
            context_layout=config.context.layout,
            seed=config.seed,
            dtype=dtype,
        ).to(device)
        named = list(self.model.global_parameters())
        self.buckets = GradientBuckets(
            [p for _, p in named],
            mesh.data,
            bucket_bytes=config.train.bucket_bytes,
            gradient_dtype=torch.float32,
        )
        self.partial = PartialGradients({p: self.buckets.gradient(p) for _, p in named}, mesh)
        self.extra_axes: list[Axis] = []
        if self.model_config.tied_embeddings:
            tied = tied_embedding_axis(mesh)
            if tied is not None and self.model.has_tied_copy:
                self.partial.tie(dict(named)["embedding.weight"], tied)
                self.extra_axes.append(tied)
        self.optimizer = Optimizer(named, self.buckets, config.optimizer)
        self.runtime = self._pipeline(dtype)
        self.step = 0

    def _pipeline(self, dtype: torch.dtype) -> PipelineRuntime:
        train, mesh = self.config.train, self.mesh
        length = train.sequence_length // mesh.cp.size
        if self.model.sequence_parallel:
            length //= mesh.tp.size
        num_microbatches = train.batch_size // mesh.dp.size // train.microbatch_size
        return PipelineRuntime(
            TrainingStage(self.model),
            mesh.pp,
            getattr(schedules, self.config.pipeline.schedule)(mesh.pp.size, num_microbatches),
            activation_shape=(train.microbatch_size, length, self.model_config.d_model),
            activation_dtype=dtype,
            device=self.device,
        )

    @property
    def axes(self) -> list[Axis]:
        mesh = self.mesh
        return [mesh.data, mesh.pp, mesh.cp, mesh.tp, mesh.world, *self.extra_axes]

    def _microbatches(self, tokens: torch.Tensor, targets: torch.Tensor) -> list:
        return split_batch(
            tokens,
            targets,
            self.mesh,
            microbatch_size=self.config.train.microbatch_size,
            layout=self.config.context.layout,
            device=self.device,
        )

    def _sum_over_world(self, *values: torch.Tensor | float) -> list[float]:
        packed = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.device.type == "cuda":
            packed = packed.to(self.device)
        return all_reduce_start(packed, self.mesh.world).wait().tolist()

    def _own_loss(self, losses: list[torch.Tensor]) -> float:
        """This rank's part of the batch's loss: tp ranks of the last stage hold the same value, the first answers for it."""
        return sum(float(loss) for loss in losses) if self.mesh.tp.rank == 0 else 0.0

    def train_step(self) -> dict[str, float]:
        """One update; returns its loss (nats a token, before the update) and gradient norm (before clipping)."""
        self.buckets.zero()
        tokens, targets = self.data.train_batch(self.step, self.config.train.batch_size)
        losses = self.runtime.step(self._microbatches(tokens, targets), on_last_backward=self.buckets)
        self.buckets.finish()
        self.partial.sum()
        tied_copy = "embedding.weight" if self.model.has_tied_copy and not self.model.is_first else None
        loss, square_sum = self._sum_over_world(
            self._own_loss(losses), self.optimizer.square_sum(self.mesh, tied_copy)
        )
        norm = math.sqrt(square_sum)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RuntimeError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; weights were not changed. Lower "
                "optimizer.lr, or look at the data of this step; the last checkpoint is good"
            )
        lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        self.optimizer.step(lr, norm)
        self.step += 1
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}

    @torch.no_grad()
    def evaluate(self, num_batches: int) -> float:
        """Mean loss (nats a token) over the first ``num_batches`` validation batches."""
        total = count = 0.0
        for index in range(min(num_batches, self.data.num_validation_batches(self.config.train.batch_size))):
            tokens, targets = self.data.validation_batch(index, self.config.train.batch_size)
            num_targets = float((targets != -100).sum())
            losses = self.runtime.evaluate(self._microbatches(tokens, targets))
            total += self._own_loss(losses) * num_targets
            count += num_targets
        return self._sum_over_world(total)[0] / max(count, 1.0)

    def save(self, directory: Path) -> Path:
        extra = {"config": self.config.to_dict()}
        return checkpoint.save(directory, self.step, self.optimizer.state(), self.mesh, extra)

    def load(self, path: Path) -> None:
        self.step = checkpoint.load(path, self.optimizer.state(), self.mesh)["step"]
        self.optimizer.loaded(self.step)


@contextlib.contextmanager
def process_group(threads: int) -> Iterator[torch.device]:
    """Joins the job that torchrun (or ``pypar train``) started, if any; yields this rank's device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(config: RunConfig) -> None:
    """Train as ``config`` says, from its last complete checkpoint where it asks to resume; writes runs/<name>/."""
    with process_group(config.train.threads) as device:
        mesh = Mesh(**parse_mesh(config.mesh), device_type=device.type)
        _run(Trainer(config, mesh, device), config.run_directory)


def _run(trainer: Trainer, directory: Path) -> None:
    config, mesh = trainer.config, trainer.mesh
    writes = mesh.world.rank == 0
    resume_from = config.resume_path()
    if resume_from is not None:
        trainer.load(resume_from)
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    metrics = Metrics(directory if writes else None, config.train.steps, trainer.step)
    if resume_from is not None:
        metrics.say(f"resumed from {resume_from} at step {trainer.step}")
    _steps(trainer, directory, metrics)
    val_loss = trainer.evaluate(trainer.data.num_validation_batches(config.train.batch_size))
    saved = trainer.save(directory / "checkpoints")
    metrics.close()
    if writes:
        _report(trainer, directory, val_loss, saved)


def _steps(trainer: Trainer, directory: Path, metrics: Metrics) -> None:
    config, train = trainer.config, trainer.config.train
    peak = matmul_rate(PRECISIONS[train.precision], trainer.device) * trainer.mesh.world.size
    tokens_per_step = train.batch_size * train.sequence_length
    flops_per_step = tokens_per_step * trainer.model_config.flops_per_token(train.sequence_length)
    if trainer.step == 0:
        metrics.say(
            f"MFU: {FLOP_CONVENTION}; peak = {peak / 1e9:.0f} GFLOP/s, measured ({train.precision} 1024^3 matmul x ranks)"
        )
    while trainer.step < train.steps:
        for axis in trainer.axes:
            axis.traffic.reset()
        start = time.perf_counter()
        line: dict[str, object] = dict(trainer.train_step())
        seconds = time.perf_counter() - start
        waited = sum(axis.traffic.wait_seconds for axis in trainer.axes)
        line |= {
            "tokens_per_s": tokens_per_step / seconds,
            "mfu": flops_per_step / seconds / peak,
            "wait_share": waited / seconds,
            "bytes_sent": {axis.name: axis.traffic.bytes_sent for axis in trainer.axes if axis.size > 1},
        }
        last = trainer.step == train.steps
        if train.evaluate_every and trainer.step % train.evaluate_every == 0 and not last:
            line["val_loss"] = trainer.evaluate(train.evaluate_batches)
        metrics.write(line, show=trainer.step % train.log_every == 0 or trainer.step == 1 or last)
        if train.checkpoint_every and trainer.step % train.checkpoint_every == 0 and not last:
            trainer.save(directory / "checkpoints")
            checkpoint.keep_newest(directory / "checkpoints", train.keep_checkpoints)


def _report(trainer: Trainer, directory: Path, val_loss: float, saved: Path) -> None:
    config = trainer.config
    entropies = trainer.data.validation_entropies()
    lines = Metrics.read(directory / "metrics.jsonl")
    lines[-1]["val_loss"] = val_loss
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    levels = {f"{name} entropy": value for name, value in entropies.items()}
    draw_loss_curve(lines, levels, directory / "loss.png")
    compared = ", ".join(f"{name} {value:.3f}" for name, value in levels.items())
    print(f"validation loss {val_loss:.4f} nats a token ({compared} of the same text)")
    text = generate(
        saved, config.train.sample_prompt, config.train.sample_tokens, temperature=0.8, seed=config.seed
    )
    (directory / "sample.txt").write_text(text + "\n")
    print(f"sample:\n{text}\n")
    print(
        f"checkpoint {saved}\nloss curve {directory / 'loss.png'}\nmetrics    {directory / 'metrics.jsonl'}"
    )
