"""The configuration of a training run that is so small that a test can afford it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.d_ff": 48,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.microbatch_size": 1,
    "train.sequence_length": 32,
    "train.evaluate_every": 0,
    "train.sample_tokens": 4,
    "train.threads": 1,
}


def small_run(place: Path, **changes: Any) -> dict[str, Any]:
    """Keys and values of a run that reads text.txt in the folder and writes into runs there; `a__b` changes `a.b`."""
    paths = {
        "directory": place / "runs",
        "data.path": place / "text.txt",
        "data.cache_directory": place / "cache",
    }
    return paths | SMALL | {key.replace("__", "."): value for key, value in changes.items()}


def assignments(values: Mapping[str, Any]) -> list[str]:
    """The values as `load_config` takes them."""
    return [f"{key}={value}" for key, value in values.items()]


def set_arguments(values: Mapping[str, Any]) -> list[str]:
    """The values as the command takes them."""
    return [word for each in assignments(values) for word in ("--set", each)]
