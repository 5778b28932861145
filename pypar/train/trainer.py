"""One rank of a training run: the model on the mesh, a step, evaluation, checkpoints."""

import dataclasses
import math
from pathlib import Path

import torch

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.data_parallel.gradients import Gradients
from pypar.mesh import Axis, Mesh
from pypar.models import ContextParallel, Decoder
from pypar.optimizers.masters import Optimizer
from pypar.optimizers.schedule import learning_rate
from pypar.pipeline_parallel import PipelineRuntime, schedules
from pypar.train import checkpoint
from pypar.train.batch import Microbatch, TrainingStage, split_batch
from pypar.train.config import RunConfig
from pypar.train.data import Batch, TokenData, open_data
from pypar.train.precision import PRECISIONS
from pypar.train.resume import identity, resumption

SAMPLED_TOKENS = 1 << 16  # of each part, compared between ranks


class Trainer:
    """One rank's share of a run: a function of (config, step, samples seen), so that any layout resumes any other."""

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.data = open_data(
            config.data, config.train.sequence_length, config.seed, config.train.packed_documents
        )
        _check_same_data(self.data, mesh)
        dtype = PRECISIONS[config.train.precision]
        self.model_config = config.decoder_config(self.data.vocab_size)
        self.model = Decoder(
            self.model_config,
            mesh,
            sequence_parallel=config.train.sequence_parallel,
            context=ContextParallel(**dataclasses.asdict(config.context)),
            seed=config.seed,
            dtype=dtype,
        ).to(device)
        named = list(self.model.global_parameters())
        self.gradients = Gradients(
            [p for _, p in named],
            mesh,
            bucket_bytes=config.train.bucket_bytes,
            gradient_dtype=torch.float32,
            rebuild=False,  # a resumed run has the buckets of one that was not interrupted
        )
        self.optimizer = Optimizer(named, self.gradients.gradient, config.optimizer)
        self.runtime = self._pipeline()
        self.step = self.samples = 0  # updates made, and samples seen, since the start of the run

    def _pipeline(self) -> PipelineRuntime:
        train, pp = self.config.train, self.mesh.pp
        num_microbatches = train.batch_size // self.mesh.dp.size // train.microbatch_size
        schedule = schedules.build(self.config.pipeline.schedule, pp.size, num_microbatches)
        return PipelineRuntime(TrainingStage(self.model), pp, schedule, device=self.device)

    @property
    def axes(self) -> list[Axis]:
        mesh = self.mesh
        axes = [mesh.data, mesh.pp, mesh.cp, mesh.tp, mesh.world, *self.gradients.axes]
        return list(dict.fromkeys(axes))

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        return split_batch(
            batch.tokens,
            batch.targets,
            self.mesh,
            microbatch_size=self.config.train.microbatch_size,
            layout=self.config.context.layout,
            device=self.device,
            documents=batch.documents,
        )

    def sum_over_world(self, *values: torch.Tensor | float) -> list[float]:
        """The sum of each value over all ranks, in fp64; every rank calls it."""
        packed = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.device.type == "cuda":
            packed = packed.to(self.device)
        return all_reduce_start(packed, self.mesh.world).wait().tolist()

    def _own_loss(self, losses: list[torch.Tensor]) -> float:
        """This rank's part of the loss: the tp ranks of the last stage hold the same value, the first one counts."""
        return sum(float(loss) for loss in losses) if self.mesh.tp.rank == 0 else 0.0

    def train_step(self) -> dict[str, float]:
        """One update; returns the loss (nats a token) before it and the gradient norm before clipping."""
        self.gradients.zero()
        batch = self.data.train_batch(self.samples, self.config.train.batch_size)
        losses = self.runtime.step(self._microbatches(batch), on_last_backward=self.gradients)
        self.gradients.finish()
        loss, square_sum = self.sum_over_world(self._own_loss(losses), self.optimizer.square_sum(self.mesh))
        norm = math.sqrt(square_sum)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RuntimeError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; the weights were not "
                "changed. Lower optimizer.lr, or look at this step's data; the last checkpoint is good"
            )
        lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        self.optimizer.step(lr, norm)
        self.step += 1
        self.samples += self.config.train.batch_size
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}

    @torch.no_grad()
    def evaluate(self, num_batches: int) -> float:
        """Mean loss (nats a token) over the first ``num_batches`` validation batches."""
        total = count = 0.0
        for index in range(min(num_batches, self.data.num_validation_batches(self.config.train.batch_size))):
            batch = self.data.validation_batch(index, self.config.train.batch_size)
            num_targets = float((batch.targets != -100).sum())
            losses = self.runtime.evaluate(self._microbatches(batch))
            total += self._own_loss(losses) * num_targets
            count += num_targets
        if not count:
            raise ValueError("the validation text has nothing to learn; raise data.validation_fraction")
        return self.sum_over_world(total)[0] / count

    def save(self, directory: Path) -> Path:
        extra = {"config": self.config.to_dict(), "samples": self.samples, "data": identity(self.data)}
        return checkpoint.save(directory, self.step, self.optimizer.state(), self.mesh, extra)

    def load(self, path: Path) -> tuple[str, ...]:
        """Go on from ``path``; returns what the configuration has changed since, a line each.

        ValueError where the checkpoint cannot be read, or is of another model or other data.
        """
        going_on = resumption(path, checkpoint.read_manifest(path), self.config, self.data)
        self.step = checkpoint.load(path, self.optimizer.state(), self.mesh)["step"]
        self.samples = going_on.samples
        self.optimizer.loaded(self.step)
        return going_on.changes


def _check_same_data(data: TokenData, mesh: Mesh) -> None:
    """Every node has a cache of its own, made of the files that it sees: they must be the same everywhere."""
    sampled = []
    for part, tokens in data.tokens.items():
        held = {"tokens": tokens, "ends of documents": data.ends[part], "learned tokens": data.learned[part]}
        for what, values in held.items():
            if values is not None:
                some = values[:: max(1, len(values) // SAMPLED_TOKENS)].astype("int64")
                sampled += [
                    (f"number of {part} {what}", torch.tensor([len(values)])),
                    (f"{part} {what}", torch.from_numpy(some)),
                ]
    difference = first_difference(sampled, mesh.world)
    if difference is not None:
        raise ValueError(
            f"the ranks do not read the same data: {difference} differs; give every node the same files under data.path"
        )
