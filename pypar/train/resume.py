"""Going on from a checkpoint: which samples the run has seen, and what its configuration has changed since."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.learning_rate import learning_rate
from pypar.settings import keys_of
from pypar.train.checkpoint import shown_value
from pypar.train.config import RunConfig

if TYPE_CHECKING:
    from pypar.train.data.windows import TokenData

DIGESTED_TOKENS = 1 << 16  # so many, evenly spread; all of a text that is not longer


@dataclass(frozen=True)
class Resumption:
    """samples: how many the run has seen of its data. changes: of the configuration, a line each."""

    samples: int
    changes: tuple[str, ...]


def identity(data: "TokenData") -> dict[str, Any]:
    """What decides which sample is which: the training text, the sequence length and the seed.

    The text counts by its length and a digest of `DIGESTED_TOKENS` of its tokens, not by its files' names and times:
    the same text elsewhere is the same data.
    """
    tokens, learned = data.tokens["train"], data.learned["train"]
    every = max(1, -(-len(tokens) // DIGESTED_TOKENS))
    digest = hashlib.blake2b(digest_size=16)
    digest.update(tokens[::every].astype("<u4").tobytes())
    if learned is not None:
        digest.update(learned[::every].astype(np.uint8).tobytes())
    return {
        "tokens": len(tokens),
        "digest": digest.hexdigest(),
        "sequence_length": data.sequence_length,
        "seed": data.seed,
        "windows": data.num_train_windows,
    }


def resumption(path: Path, manifest: Mapping[str, Any], config: RunConfig, data: "TokenData") -> Resumption:
    """How a run of ``config`` on ``data`` goes on from the checkpoint at ``path``.

    ValueError where the samples are others than the checkpoint's, unless ``train.resume_data`` is "restart".
    """
    extra = manifest["extra"]
    samples, written, now = extra.get("samples"), extra.get("data"), identity(data)
    if type(samples) is not int or not 0 <= samples < 1 << 60 or not isinstance(written, dict):
        raise ValueError(
            f"checkpoint {path} does not say which samples its run has seen; start a run of another name"
        )
    changes = list(_changes(extra.get("config"), config, manifest["step"]))
    other = [_difference(key, written.get(key), now[key]) for key in now if written.get(key) != now[key]]
    if not other:
        return Resumption(samples, tuple(changes))
    if config.train.resume_data != "restart":
        raise ValueError(
            f"checkpoint {path} has seen {samples:,} samples of other data: {other[0]}; resume with what it was, or "
            "set train.resume_data=restart to begin the new data at its first sample"
        )
    return Resumption(0, (*changes, f"the data begins at its first sample: {'; '.join(other)}"))


def _difference(key: str, then: Any, now: Any) -> str:
    if key in ("sequence_length", "seed"):
        name = key if key == "seed" else f"train.{key}"
        return f"{name} was {shown_value(then)} and is {now}"
    if key == "tokens":
        return f"the training text had {shown_value(then)} tokens and has {now}"
    return "the training text has other tokens" if key == "digest" else f"it was cut into other {key}"


def _changes(written: Any, config: RunConfig, step: int) -> Iterator[str]:
    """Each key whose value is not the checkpoint's, and what follows for the learning rate."""
    then, now = dict(_leaves(written)), dict(_leaves(config.to_dict()))
    for key in keys_of(config):
        name = key.name
        if name in then and then[name] != now[name] and key.resumed is not None:
            line = f"{name} {shown_value(then[name])} -> {shown_value(now[name])}"
            yield f"{line} ({key.resumed})" if key.resumed else line
    yield from _rate_change(then, config, step)


def _rate_change(then: Mapping[str, Any], config: RunConfig, step: int) -> Iterator[str]:
    rate: dict[str, Any] = {
        key: then.get(f"optimizer.{key}") for key in ("lr", "min_lr_ratio", "warmup_steps")
    }
    steps = then.get("train.steps")
    if not all(type(value) in (int, float) and abs(value) < 1 << 60 for value in (*rate.values(), steps)):
        return  # no run's
    before = learning_rate(step, int(steps or 0), OptimizerConfig(**rate))
    after = learning_rate(step, config.train.steps, config.optimizer)
    if before != after:
        yield f"the learning rate of step {step + 1} is {after:.4g}, not {before:.4g}"


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
