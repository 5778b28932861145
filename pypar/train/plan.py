"""Everything that can be refused before a rank is started: sizes that do not divide, data, checkpoints.

`check` also prepares the token cache, so that ranks find it.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypar.train import checkpoint
from pypar.train.config import RunConfig
from pypar.train.data import open_data
from pypar.train.resume import resumption
from pypar.train.sources import PYTHON_STDLIB
from pypar.train.tokens import SPECIAL_TOKENS, check_text, open_tokenizer

if TYPE_CHECKING:
    from pypar.models import DecoderConfig

# key: (smallest, largest); a tuple's bound that is a string is not reached itself
_AT_LEAST_0 = (0, math.inf)
_AT_LEAST_1 = (1, math.inf)
_POSITIVE = ("0", math.inf)
_SHARE = (0, 1)
BOUNDS: dict[str, tuple[float | str, float | str]] = {
    "model.vocab_size": _AT_LEAST_0,
    "model.num_layers": _AT_LEAST_1,
    "model.d_model": _AT_LEAST_1,
    "model.num_heads": _AT_LEAST_1,
    "model.num_kv_heads": _AT_LEAST_1,
    "model.head_size": _AT_LEAST_0,
    "model.d_ff": _AT_LEAST_1,
    "model.rope_theta": _POSITIVE,
    "model.norm_eps": _POSITIVE,
    "data.validation_fraction": ("0", "1"),
    "optimizer.lr": _POSITIVE,
    "optimizer.min_lr_ratio": _SHARE,
    "optimizer.warmup_steps": _AT_LEAST_0,
    "optimizer.beta1": (0, "1"),
    "optimizer.beta2": (0, "1"),
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.clip_norm": _AT_LEAST_0,
    "train.steps": _AT_LEAST_1,
    "train.batch_size": _AT_LEAST_1,
    "train.microbatch_size": _AT_LEAST_1,
    "train.sequence_length": _AT_LEAST_1,
    "train.evaluate_every": _AT_LEAST_0,
    "train.evaluate_batches": _AT_LEAST_1,
    "train.final_evaluate_batches": _AT_LEAST_1,
    "train.checkpoint_every": _AT_LEAST_0,
    "train.keep_checkpoints": _AT_LEAST_0,
    "train.threads": _AT_LEAST_0,
    "train.sample_tokens": _AT_LEAST_0,
    "context.ulysses_size": _AT_LEAST_0,
    "train.bucket_bytes": _AT_LEAST_1,
    "train.log_every": _AT_LEAST_1,
}
CHOICES = {
    "optimizer.name": ("adamw",),
    "data.special_tokens": SPECIAL_TOKENS,
    "train.precision": ("fp32", "bf16"),
    "train.resume_data": ("same", "restart"),
    "context.layout": ("zigzag", "contiguous", "striped"),
    "context.method": ("ring", "all_gather", "ulysses", "hybrid", "auto"),
}


@dataclass(frozen=True)
class Plan:
    """A run that may start: ``config`` with mesh, paths and checkpoint filled in; ``notes`` for the user."""

    config: RunConfig
    num_ranks: int
    notes: tuple[str, ...]


def check(config: RunConfig, world_size: int | None = None, *, overwrite: bool = False) -> Plan:
    """Refuse with a ``ValueError`` what could not run, and prepare what can.

    world_size: the ranks that were started; None where the mesh says how many to start.
    overwrite: the run's earlier checkpoints may be deleted.
    """
    from pypar.mesh import check_mesh, format_mesh, mesh_grid, parse_mesh

    check_values(config)
    sizes = parse_mesh(config.mesh or f"dp={world_size or 1}")
    if "ep" in sizes:
        raise ValueError(
            f"ep={sizes['ep']} asks for expert parallelism, which pypar does not have yet; use ep=1"
        )
    num_ranks = mesh_grid(sizes).num_ranks
    check_mesh(sizes, num_ranks if world_size is None else world_size)
    model = config.decoder_config(
        open_tokenizer(config.data.tokenizer, config.data.special_tokens).vocab_size
    )
    notes = [*_check_layout(config, model, sizes)]
    _check_run_directory(config, overwrite)
    resume, note = _find_checkpoint(config)
    if resume is not None:  # before the data are prepared, which may take long
        manifest = _check_resume(resume, config, model, headers=world_size is None)
    tokens = open_data(config.data, config.train.sequence_length, config.seed)
    notes += tokens.cache.notes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if world_size is None and num_ranks > cores:
        notes.append(f"{num_ranks} ranks share {cores} cores: they will wait for each other")
    data = dataclasses.replace(
        config.data,
        path=config.data.path if config.data.path == PYTHON_STDLIB else os.path.abspath(config.data.path),
        tokenizer="bytes" if config.data.tokenizer == "bytes" else os.path.abspath(config.data.tokenizer),
    )
    filled = dataclasses.replace(
        config,
        mesh=format_mesh(sizes),
        data=data,
        train=dataclasses.replace(config.train, resume="" if resume is None else os.path.abspath(resume)),
    )
    if resume is not None:
        resumption(resume, manifest, filled, tokens)
    return Plan(filled, num_ranks, tuple(notes + note))


def check_values(config: RunConfig) -> None:
    values = config.to_dict()
    for key, (low, high) in BOUNDS.items():
        section, _, leaf = key.partition(".")
        value = values[section][leaf]
        if not math.isfinite(value):
            raise ValueError(f"{key} ({value}) must be a finite number")
        above = value > float(low) if isinstance(low, str) else value >= low
        below = value < float(high) if isinstance(high, str) else value <= high
        if not (above and below):
            lower = f"greater than {low}" if isinstance(low, str) else f"at least {low}"
            upper = f"less than {high}" if isinstance(high, str) else f"at most {high}"
            rule = lower if high == math.inf else f"{lower} and {upper}"
            raise ValueError(f"{key} ({value}) must be {rule}")
    for key, choices in CHOICES.items():
        section, _, leaf = key.partition(".")
        _check_choice(key, values[section][leaf], choices)
    check_text("train.sample_prompt", config.train.sample_prompt)
    if not config.name.strip():
        raise ValueError("name must not be empty: the run is written to <directory>/<name>; use --name")


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key} {value!r} is not one of {', '.join(choices)}{hint}")


def _nearest(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``."""
    down, up = value - value % unit, value - value % unit + unit
    return f"{down} or {up}" if down else str(up)


def _check_divides(key: str, value: int, unit: int, by: str) -> None:
    if value % unit:
        raise ValueError(f"{key} ({value}) must divide by {by} ({unit}); use {_nearest(value, unit)}")


def _check_layout(config: RunConfig, model: "DecoderConfig", sizes: dict[str, int]) -> list[str]:
    """Whether the model and the batch can be cut as the mesh says; notes on what runs, but not well."""
    from pypar.pipeline_parallel import schedules

    train, (dp, pp, cp, tp) = config.train, (sizes[name] for name in ("dp", "pp", "cp", "tp"))
    for name in ("num_heads", "num_kv_heads", "vocab_size", "d_ff"):
        _check_divides(f"model.{name}", getattr(model, name), tp, "the tp size")
    if model.num_layers < pp:
        raise ValueError(
            f"model.num_layers ({model.num_layers}) must be at least the pp size ({pp}): each stage holds a "
            f"layer; use pp={model.num_layers} or more layers"
        )
    if cp > 1:
        _check_context(config, model.num_heads // tp, cp)
    if train.sequence_parallel and tp > 1:
        _check_sequence_parallel(train.sequence_length, config.context.layout, cp, tp)
    _check_divides(
        "train.batch_size",
        train.batch_size,
        dp * train.microbatch_size,
        "the dp size x train.microbatch_size",
    )
    num_microbatches = train.batch_size // dp // train.microbatch_size
    schedules.build(config.pipeline.schedule, pp, num_microbatches)
    if num_microbatches < pp:
        idle = (pp - 1) / (num_microbatches + pp - 1)
        count = f"{num_microbatches} microbatch{'es' * (num_microbatches > 1)}"
        return [f"{pp} stages with {count} a step leave each rank idle {idle:.0%} of the time"]
    return []


def _check_context(config: RunConfig, heads: int, cp: int) -> None:
    """heads: query heads of one tp rank."""
    context, length = config.context, config.train.sequence_length
    if length < cp:
        raise ValueError(
            f"train.sequence_length ({length}) must be at least the cp size ({cp}): each rank holds a position"
        )
    a = {"ulysses": cp, "hybrid": context.ulysses_size or 1}.get(context.method, 1)
    if cp % a:
        divisors = ", ".join(str(n) for n in range(1, cp + 1) if cp % n == 0)
        raise ValueError(f"context.ulysses_size ({a}) must divide the cp size ({cp}); use one of {divisors}")
    if a > heads:
        raise ValueError(
            f"context.method {context.method!r} shares the {heads} query heads of a tp rank between {a} cp ranks, "
            'which are more; use context.method "ring" or "hybrid" with a smaller context.ulysses_size'
        )
    if context.method == "hybrid" and context.layout == "striped" and a < cp:
        raise ValueError(
            'context.method "hybrid" needs a layout of chunks; use context.layout "zigzag" or "contiguous"'
        )


def _check_sequence_parallel(length: int, layout: str, cp: int, tp: int) -> None:
    """Each cp rank's positions are split over tp."""
    from pypar.context_parallel.layouts import num_positions, segments_of

    for rank in range(cp):
        held = num_positions(segments_of(length, rank, cp, layout))
        if held % tp:
            rule = f"cp x tp of sequence parallel ({cp * tp})" if cp > 1 else f"the tp size ({tp})"
            whose = f": cp rank {rank} holds {held} positions in the {layout} layout" if cp > 1 else ""
            raise ValueError(
                f"train.sequence_length ({length}) must divide by {rule}{whose}; use {_nearest(length, cp * tp)}"
            )


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


def _check_resume(path: Path, config: RunConfig, model: "DecoderConfig", *, headers: bool) -> dict[str, Any]:
    manifest = checkpoint.check_readable(path, model, headers=headers)
    if manifest["step"] >= config.train.steps:
        raise ValueError(
            f"checkpoint {path} is at step {manifest['step']} and train.steps is {config.train.steps}: nothing is left "
            "to train; raise train.steps"
        )
    return manifest


def check_whole_model(path: Path) -> tuple[RunConfig, "DecoderConfig"]:
    """The run that wrote a checkpoint and its model, which fits the weights that are there.

    ValueError otherwise, before anything of the size that the checkpoint claims is allocated.
    """
    extra = checkpoint.read_extra(path)
    if not isinstance(extra.get("config"), dict):
        raise ValueError(
            f"checkpoint {path} does not hold the configuration of a run; it was not written by one"
        )
    try:
        config = RunConfig.from_dict(extra["config"])
        check_values(config)
        tokenizer = open_tokenizer(config.data.tokenizer, config.data.special_tokens)
        model = config.decoder_config(tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} holds a configuration that cannot be: {error}") from None
    checkpoint.check_readable(path, model)
    return config, model
