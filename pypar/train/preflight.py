"""Everything that can be refused before a rank is started: sizes that do not divide, data, checkpoints.

`check` also prepares the token cache, so that ranks find it.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypar.grid import SAMPLES
from pypar.mesh_shape import MeshShape, check_mesh, parse_mesh
from pypar.settings import Run, check_values, sections_of
from pypar.tensor_parallel.config import num_ranks
from pypar.train import checkpoint
from pypar.train.config import RunConfig
from pypar.train.data.sources import PYTHON_STDLIB
from pypar.train.data.tokens import open_tokenizer
from pypar.train.data.windows import open_data
from pypar.train.resume import resumption

if TYPE_CHECKING:
    from pypar.models.family import Sizes


# Of configurations in older checkpoints: "store" had one choice, and is `memory` now.
FORMER_SECTIONS = ("store",)


@dataclass(frozen=True)
class Ready:
    """A run that may start: ``config`` with mesh, paths and checkpoint filled in; ``notes`` for the user."""

    config: RunConfig
    num_ranks: int
    notes: tuple[str, ...]


def check(
    config: RunConfig, world_size: int | None = None, *, overwrite: bool = False, has_own_model: bool = False
) -> Ready:
    """Refuse with a ``ValueError`` what could not run, and prepare what can.

    world_size: the ranks that were started; None where the mesh says how many to start.
    overwrite: the run's earlier checkpoints may be deleted.
    has_own_model: the model is the user's, and the section ``model`` is not looked at.
    """
    check_values(config)
    shape = parse_mesh(config.mesh or f"dp={world_size or 1}")
    started = shape.grid.num_ranks
    check_mesh(shape, started if world_size is None else world_size)
    _check_views(shape)
    tokenizer = open_tokenizer(config.data.tokenizer, config.data.special_tokens)
    model = None if has_own_model else config.model.sizes(tokenizer.vocab_size)
    config, notes = _checked_sections(
        config, model, {name: shape.grid.size(name) for name in shape.grid.names}
    )
    _check_run_directory(config, overwrite)
    resume, note = _find_checkpoint(config)
    if resume is not None:  # before the data are prepared, which may take long
        manifest = _check_resume(resume, config, model, headers=world_size is None)
    tokens = open_data(config.data, config.train.sequence_length, config.seed)
    notes += tokens.cache.notes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if world_size is None and started > cores:
        notes.append(f"{started} ranks share {cores} cores: they will wait for each other")
    data = dataclasses.replace(
        config.data,
        path=config.data.path if config.data.path == PYTHON_STDLIB else os.path.abspath(config.data.path),
        tokenizer="bytes" if config.data.tokenizer == "bytes" else os.path.abspath(config.data.tokenizer),
    )
    filled = dataclasses.replace(
        config,
        mesh=str(shape),
        data=data,
        train=dataclasses.replace(config.train, resume="" if resume is None else os.path.abspath(resume)),
    )
    if resume is not None:
        resumption(resume, manifest, filled, tokens)
    return Ready(filled, started, tuple(notes + note))


def _check_views(shape: MeshShape) -> None:
    """ValueError for a refinement or a fold over which nothing is spread, as it would change nothing."""
    if not shape.views:
        return
    from pypar.parallel.roles import AXES  # slow: torch

    used = {text for name, text in shape.views.items() if name in AXES}
    for name, text in shape.views.items():
        if text not in used:
            raise ValueError(
                f"mesh {shape} has an axis {name!r} by {text}, over which nothing is spread: the roles of a plan are "
                f"about {', '.join(AXES)}; leave it out"
            )


def _checked_sections(
    config: RunConfig, model: "Sizes | None", axes: Mapping[str, int]
) -> tuple[RunConfig, list[str]]:
    """The configuration with the schedule that is chosen, after a check that every section can be run on the mesh; and
    notes on what is chosen, and on what runs, but not well.

    model: filled in; None where it is the user's own.
    """
    train = config.train
    run = Run(
        axes=axes,
        num_layers=None if model is None else model.num_layers,
        num_heads=None if model is None else model.num_heads // num_ranks(axes),
        sequence_length=train.sequence_length,
        num_positions=config.context.num_positions(train.sequence_length, axes),
        num_microbatches=train.num_microbatches(axes[SAMPLES]),
    )
    pipeline, chosen = config.pipeline.chosen(run)
    config = filled = dataclasses.replace(config, pipeline=pipeline)
    if model is not None:
        filled = dataclasses.replace(config, model=config.model.filled(model.vocab_size))
    sections = [s for s in sections_of(filled) if model is not None or s is not filled.model]
    config.recompute.check_budget(config.memory.activation_bytes)
    return config, [*chosen, *(note for section in sections for note in section.check(run))]


def _check_run_directory(config: RunConfig, overwrite: bool) -> None:
    complete, faults = checkpoint.survey(config.checkpoint_directory)
    if (complete or faults) and not config.train.resume and not overwrite:
        last = f"its last checkpoint is {complete[0].name}" if complete else faults[0]
        raise ValueError(
            f"{config.run_directory} holds an earlier run ({last}); continue it with --resume, give this one another "
            "--name, or delete the old one with --overwrite"
        )
    try:
        config.checkpoint_directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{config.run_directory} cannot be written: {error.strerror}; set directory"
        ) from error


def _find_checkpoint(config: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, if any, and what to say about it."""
    path, notes = config.resume_path(), []
    if config.train.resume == "auto":
        complete, faults = checkpoint.survey(config.checkpoint_directory)
        if faults and not complete:
            raise ValueError(f"{faults[0]}, or start anew with --overwrite and without --resume")
        notes = faults if complete else [f"no checkpoint in {config.checkpoint_directory} yet: starting anew"]
    return path, notes


def _check_resume(path: Path, config: RunConfig, model: "Sizes | None", *, headers: bool) -> dict[str, Any]:
    if model is None:  # its tensors are compared when they are read
        manifest = checkpoint.read_manifest(path)
    else:
        _check_family(path, config)
        manifest = checkpoint.check_readable(path, model, headers=headers)
    if manifest["step"] >= config.train.steps:
        raise ValueError(
            f"checkpoint {path} is at step {manifest['step']} and train.steps is {config.train.steps}: nothing is left "
            "to train; raise train.steps"
        )
    return manifest


def _check_family(path: Path, config: RunConfig) -> None:
    """ValueError for a checkpoint of another family, whose weights may well have the names and shapes of this one's."""
    written: Any = checkpoint.read_extra(path).get("config")
    for name in ("model", "family"):
        written = written.get(name) if isinstance(written, dict) else None
    now = config.model.family
    if written is not None and written != now:  # None: older than families
        raise ValueError(
            f"checkpoint {path} holds a model of family {checkpoint.shown_value(written)} but the configuration says "
            f"{checkpoint.shown_value(now)}; set model.family or start a run of another name"
        )


def check_whole_model(path: Path) -> tuple[RunConfig, "Sizes"]:
    """The run that wrote a checkpoint and its model, which fits the weights that are there.

    ValueError otherwise, before anything of the size that the checkpoint claims is allocated.
    """
    extra = checkpoint.read_extra(path)
    if not isinstance(extra.get("config"), dict):
        raise ValueError(
            f"checkpoint {path} does not hold the configuration of a run; it was not written by one"
        )
    try:
        config = RunConfig.from_dict({k: v for k, v in extra["config"].items() if k not in FORMER_SECTIONS})
        check_values(config)
        tokenizer = open_tokenizer(config.data.tokenizer, config.data.special_tokens)
        model = config.model.sizes(tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} holds a configuration that cannot be: {error}") from None
    checkpoint.check_readable(path, model)
    return config, model
