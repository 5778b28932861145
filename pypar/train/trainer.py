"""One rank of a training run: the model on the mesh, a step, evaluation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.data_parallel.stores import store_of
from pypar.grid import DATA, SAMPLES, STAGES
from pypar.layout import Cut, Layout, answers_for
from pypar.mesh import Axis, Mesh, parse_mesh
from pypar.optimizers.learning_rate import learning_rate
from pypar.optimizers.loss_scale import LossScale
from pypar.optimizers.on_disk import OnDisk
from pypar.optimizers.update import Optimizer
from pypar.parallel import ParallelPlan
from pypar.pipeline_parallel import PipelineRuntime
from pypar.pipeline_parallel.place import schedule_of
from pypar.recomputation.apply import recompute_as
from pypar.settings import check_values
from pypar.train import checkpoint
from pypar.train.config import RunConfig
from pypar.train.data.batch import Microbatch, split_batch
from pypar.train.data.windows import Batch, TokenData, open_data
from pypar.train.job import join_job
from pypar.train.launch import joined_world_size
from pypar.train.loop import fit
from pypar.train.precision import PRECISIONS, SCALED
from pypar.train.resume import identity, resumption
from pypar.train.stage import Loss, Plan, Stages, check_whole_backwards, own_stages, stages_of

SAMPLED_TOKENS = 1 << 16  # of each part, compared between ranks


class Trainer:
    """One rank's share of a run: a function of (config, step, samples seen), so that any layout resumes any other.

        trainer = Trainer(RunConfig.from_dict({"mesh": "tp=2", "train": {"steps": 100}}))
        trainer.fit()                                                   # or, one by one:
        trainer.train_step(); trainer.evaluate(); trainer.save()

    Every rank makes it, under torchrun; without, the run has one rank.

    config  a `RunConfig`, whose data, optimizer, mesh, pipeline and train sections hold for every model
    mesh    by default made as the configuration says, after the job is joined and the configuration checked as
            `pypar train` does; the process group stays, as with torch, until destroy_process_group. With a mesh that
            is given, each value of the configuration is checked by itself, and its key ``mesh`` is not looked at
    device  by default the rank's GPU, where there is one
    model   the user's own: token ids [B, T] -> what ``loss`` takes, with the same weights on every rank. The model
            section is not looked at then. With a function blocks() it can be a pipeline; with a keyword ``sequences``
            it can be spread over cp and gets packed documents. None: the one that the model section describes, of
            which a rank only ever allocates its part
    plan    how the model is spread (`pypar.parallelize`); ``train.sequence_parallel`` and the section ``context`` say
            what it leaves out
    loss    (what the model returned, targets [B, T]) -> the sum, not the mean, of the loss over positions whose target
            is not -100, a scalar; by default the cross-entropy of logits [B, T, V]
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh | None = None,
        device: torch.device | None = None,
        *,
        model: nn.Module | None = None,
        plan: Plan = None,
        loss: Loss | None = None,
    ) -> None:
        if model is None and (plan is not None or loss is not None):
            raise ValueError("plan= and loss= belong to a model of your own; pass model= as well")
        if mesh is None:
            config, mesh, device = _joined(config, has_own_model=model is not None)
        check_values(config)
        self.config, self.mesh, self.device = config, mesh, device or torch.device("cpu")
        self.data = open_data(
            config.data, config.train.sequence_length, config.seed, config.train.packed_documents
        )
        _check_same_data(self.data, mesh)
        self.dtype = PRECISIONS[config.train.precision]
        num_microbatches = config.train.num_microbatches(mesh.axis(SAMPLES).size)
        self.schedule = schedule_of(config.pipeline, mesh, num_microbatches)
        check_whole_backwards(self.schedule, config)
        self.stages = self._own_stages() if model is None else self._stages_of(model, plan, loss)
        self.models = [stage.model for stage in self.stages.values()]
        budget = config.memory.activation_bytes
        self.activations = recompute_as(self.models, config.recompute, budget, mesh)
        self.store = store_of(config.memory, self.models, mesh, bucket_bytes=config.train.bucket_bytes)
        self.mesh = self.store.mesh  # of which layouts of what is owned may name more axes
        self.optimizer = Optimizer(self.store.owned(), config.optimizer, on_disk=self._on_disk())
        self.store.holds_states_of(self.optimizer.update)
        self.loss_scale = LossScale(config.loss_scale) if config.train.precision in SCALED else None
        self.runtime = PipelineRuntime(
            {stage: each for (_, stage), each in self.stages.items()},
            mesh.axis(STAGES),
            self.schedule,
            device=self.device,
        )
        self.step = self.samples = 0  # updates made, and samples seen, since the start of the run

    def _on_disk(self) -> Callable[..., OnDisk] | None:
        memory = self.config.memory
        if memory.offload != "nvme":
            return None
        part_bytes, owner = memory.offload_part_bytes, f"rank {self.mesh.rank}"
        return partial(OnDisk, directory=memory.offload_directory, part_bytes=part_bytes, owner=owner)

    def _own_stages(self) -> Stages:
        config = self.config
        sizes = config.model.sizes(self.data.vocab_size)
        self.flops_per_token = sizes.flops_per_token(config.train.sequence_length)
        plan = ParallelPlan(None, config.train.sequence_parallel, self.config.context)
        return own_stages(
            config.model.model_class(),
            sizes,
            self.mesh,
            plan,
            self.schedule,
            seed=config.seed,
            dtype=self.dtype,
            device=self.device,
        )

    def _stages_of(self, model: nn.Module, plan: Plan, loss: Loss | None) -> Stages:
        # 2 a parameter forward, 4 backward (arXiv 2001.08361); attention is not counted.
        self.flops_per_token = 6 * sum(p.numel() for p in model.parameters())
        if self.config.train.sequence_parallel:
            plan = replace(ParallelPlan.of(plan), sequence_parallel=True)
        return stages_of(
            model,
            self.mesh,
            plan,
            self.schedule,
            loss,
            config=self.config,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def model(self) -> nn.Module:
        """This rank's part of the model; ValueError where it has several stages, each with a model of its own."""
        if len(self.models) != 1:
            raise ValueError(f"this rank has {len(self.models)} stages of the model; use trainer.models")
        return self.models[0]

    @property
    def axes(self) -> list[Axis]:
        """All axes over which this run communicates, each once."""
        mesh = self.mesh
        axes = [mesh.data, *(mesh.axis(name) for name in mesh.sizes), mesh.world, *self.store.axes]
        return list(dict.fromkeys(axes))

    def _microbatches(self, batch: Batch, loss_scale: float = 1.0) -> list[Microbatch]:
        parts = split_batch(
            batch.tokens,
            batch.targets,
            self.mesh,
            microbatch_size=self.config.train.microbatch_size,
            layout=self.config.context.layout,
            device=self.device,
            documents=batch.documents,
        )
        return [replace(part, loss_scale=part.loss_scale * loss_scale) for part in parts]

    def sum_over_world(self, *values: torch.Tensor | float) -> list[float]:
        """The sum of each value over all ranks, in fp64; every rank calls it."""
        packed = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.device.type == "cuda":
            packed = packed.to(self.device)
        return all_reduce_start(packed, self.mesh.world).wait().tolist()

    def _own_loss(self, losses: list[torch.Tensor]) -> float:
        """This rank's part of the loss: of ranks that hold the same value, the first one counts."""
        parts = Layout((self.mesh.data.size,), (Cut(0, DATA),))
        return sum(map(float, losses)) if answers_for(parts, self.mesh.grid, self.mesh.rank) else 0.0

    def train_step(self) -> dict[str, float]:
        """One update; returns the loss (nats a token) before it and the gradient norm before clipping.

        In fp16 also the loss scale, and whether the update was skipped on all ranks, since a gradient on one of them
        was not finite: then only ``samples`` and the scale have changed.
        """
        self.store.zero()
        batch = self.data.train_batch(self.samples, self.config.train.batch_size)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        losses = self.runtime.step(self._microbatches(batch, scale), on_last_backward=self.store)
        self.store.reduce()
        told: list[Tensor | float] = [self._own_loss(losses), self.optimizer.square_sum(self.mesh)]
        told += [] if self.loss_scale is None else [self.optimizer.num_not_finite(self.mesh)]
        loss, square_sum, *num_not_finite = self.sum_over_world(*told)
        loss, norm = loss / scale, math.sqrt(square_sum) / scale
        is_finite = math.isfinite(loss) and math.isfinite(norm) and not any(num_not_finite)
        if not is_finite and self.loss_scale is None:
            raise RuntimeError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; the weights were not "
                "changed. Lower optimizer.lr, or look at this step's data; the last checkpoint is good"
            )
        lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        if is_finite:
            self.optimizer.step(lr, norm, scale)
            self.store.publish()
            self.step += 1
        self.samples += self.config.train.batch_size
        line = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}
        if self.loss_scale is not None:
            self.loss_scale.update(overflowed=not is_finite)
            line |= {"loss_scale": scale, "skipped": not is_finite}
        return line

    @torch.no_grad()
    def evaluate(self, num_batches: int | None = None) -> float:
        """Mean loss (nats a token) over the first validation batches: ``num_batches``, or as many as configured."""
        most = self.config.train.evaluate_batches if num_batches is None else num_batches
        total = count = 0.0
        was_training = {module: module.training for part in self.models for module in part.modules()}
        for part in self.models:
            part.eval()
        for index in range(min(most, self.data.num_validation_batches(self.config.train.batch_size))):
            batch = self.data.validation_batch(index, self.config.train.batch_size)
            num_targets = float((batch.targets != -100).sum())
            losses = self.runtime.evaluate(self._microbatches(batch))
            total += self._own_loss(losses) * num_targets
            count += num_targets
        for module, trains in was_training.items():  # a user's model may keep some modules in eval mode
            module.training = trains
        if not count:
            raise ValueError("the validation text has nothing to learn; raise data.validation_fraction")
        return self.sum_over_world(total)[0] / count

    def fit(self) -> Path:
        """Train to ``train.steps``, with evaluations, checkpoints and metrics as configured, from the checkpoint that
        ``train.resume`` names, if any. Returns the last checkpoint."""
        return fit(self)

    def save(self, directory: Path | None = None) -> Path:
        """Write a checkpoint into ``directory``, by default the run's own; every rank calls it."""
        extra = {"config": self.config.to_dict(), "samples": self.samples, "data": identity(self.data)}
        if self.loss_scale is not None:
            extra["loss_scale"] = self.loss_scale.state()
        directory = directory or self.config.checkpoint_directory
        return checkpoint.save(directory, self.step, self._state(), self.mesh, extra)

    def load(self, path: Path) -> tuple[str, ...]:
        """Go on from ``path``; returns what the configuration has changed since, a line each.

        ValueError where the checkpoint cannot be read, or is of another model or other data.
        """
        manifest = checkpoint.read_manifest(path)
        going_on = resumption(path, manifest, self.config, self.data)
        if self.loss_scale is not None:
            self.loss_scale.load(manifest["extra"].get("loss_scale"))
        self.step = checkpoint.load(path, self._state(), self.mesh)["step"]
        self.samples = going_on.samples
        self.optimizer.loaded(self.step)
        self.store.publish()
        return going_on.changes

    def _state(self) -> dict[str, tuple[Tensor, Layout]]:
        """All that a resumed run needs, by name."""
        frozen = {f"model.{name}": part for name, part in self.store.frozen().items()}
        return self.optimizer.state() | frozen


def _joined(config: RunConfig, *, has_own_model: bool) -> tuple[RunConfig, Mesh, torch.device]:
    """The configuration, checked and filled in, and this rank's mesh and device, after joining the job."""
    from pypar.train.preflight import check

    ready = check(config, joined_world_size() or 1, has_own_model=has_own_model).config
    device = join_job(ready.train.threads)
    return ready, Mesh.of(parse_mesh(ready.mesh), device_type=device.type), device


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
