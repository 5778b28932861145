"""The configuration of a run: small frozen dataclasses, read from TOML and from ``key=value`` overrides.

Every key has a default; the defaults are the main job (Python's own library as text, bytes as tokens). An
unknown key, a value of the wrong type or a file that is not TOML is a ``ValueError`` with a sentence.
"""

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypar.context_parallel.config import ContextConfig
from pypar.data_parallel.config import MemoryConfig
from pypar.models.decoder_section import DecoderSection
from pypar.models.family import ModelSection
from pypar.optimizers.config import LossScaleConfig, OptimizerConfig
from pypar.pipeline_parallel.config import PipelineConfig
from pypar.recomputation.config import RecomputeConfig
from pypar.settings import Section, keys_of, of_kind, section_of, setting
from pypar.train.sections import DataConfig, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _refuse_blank(key: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{key} must not be empty: the run is written to <directory>/<name>; use --name")


@dataclass(frozen=True)
class RunConfig:
    """One run: a section for each room that can be configured."""

    name: str = setting(
        "stdlib", refuse=_refuse_blank, help="the run is written to directory/name", resumed=None
    )
    directory: str = setting("runs", help="the folder that holds runs", resumed=None)
    seed: int = setting(0, help="of initial weights, of the order of the data and of the sample")
    mesh: str = setting(
        "",
        help='sizes of the axes, like "tp=2,pp=2"; "": every rank is on the dp axis. Refinements and folds, like '
        '"tp=4(row=2,column=2),ep=2", are refused where nothing is spread over them',
    )
    model: ModelSection = section_of(DecoderSection)
    data: DataConfig = section_of(DataConfig)
    optimizer: OptimizerConfig = section_of(OptimizerConfig)
    train: TrainConfig = section_of(TrainConfig)
    loss_scale: LossScaleConfig = section_of(LossScaleConfig)
    pipeline: PipelineConfig = section_of(PipelineConfig)
    memory: MemoryConfig = section_of(MemoryConfig)
    context: ContextConfig = section_of(ContextConfig)
    recompute: RecomputeConfig = section_of(RecomputeConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of ``to_dict``; keys that are absent keep their defaults."""
        values = dict(values)
        if isinstance(values.get("mesh"), Mapping):  # [mesh] tp = 2 reads as well as mesh = "tp=2"
            values["mesh"] = ",".join(f"{name}={size}" for name, size in values["mesh"].items())
        train = values.get("train")
        if isinstance(train, Mapping) and isinstance(train.get("resume"), bool):
            values["train"] = {**train, "resume": "auto" if train["resume"] else ""}
        recompute = values.get("recompute")
        if isinstance(recompute, Mapping) and isinstance(recompute.get("ops"), (list, tuple)):
            values["recompute"] = {**recompute, "ops": ",".join(map(str, recompute["ops"]))}
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values; what is saved beside a run and inside its checkpoints."""
        return dataclasses.asdict(self)

    @property
    def run_directory(self) -> Path:
        return Path(self.directory) / self.name

    @property
    def checkpoint_directory(self) -> Path:
        return self.run_directory / "checkpoints"

    def resume_path(self) -> Path | None:
        """The checkpoint that the run starts from; None where it starts anew, as "auto" does without one."""
        from pypar.train import checkpoint

        if self.train.resume == "":
            return None
        if self.train.resume == "auto":
            return checkpoint.latest(self.checkpoint_directory)
        return checkpoint.resolve(Path(self.train.resume))


def load_config(
    path: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Defaults, the TOML file, ``key=value`` overrides, ``flags`` (dotted key -> value): the later wins."""
    values: dict[str, Any] = _read_toml(path) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"--set {override!r} must look like section.key=value, for instance optimizer.lr=3e-4"
            )
        _put(values, key.strip(), _parse_value(text.strip()))
    for key, value in (flags or {}).items():
        _put(values, key, value)
    return RunConfig.from_dict(values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"configuration {path} is not TOML: {error}") from error
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read: {error.strerror}") from error


def _parse_value(text: str) -> Any:
    """A TOML value; what is not one is taken as a bare string, so that paths and names need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"configuration key {key!r} does not fit: {section!r} is a value, not a section")
        values = inner
    values[leaf] = value


def all_keys() -> list[str]:
    """Every dotted key there is."""
    return [key.name for key in keys_of(RunConfig)]


def _unknown(key: str) -> ValueError:
    keys = all_keys()
    section, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    places = {k.rpartition(".")[2]: k for k in keys}
    near = difflib.get_close_matches(key, keys, 1, 0.8)
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate: lr
    near = near or ([places[initials]] if len(initials) > 1 and initials in places else [])
    near = near or [places[name] for name in difflib.get_close_matches(leaf, places, 1, 0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if siblings and not near:
        hint = f" ({section or 'the top level'} has {', '.join(siblings)})"
    elif not near:
        hint = f"; the sections are {', '.join(sorted({k.partition('.')[0] for k in keys if '.' in k}))}"
    return ValueError(f"unknown configuration key {key!r}{hint}")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key, kind = prefix + name, hints.get(name)
        if kind is None:
            while isinstance(value, Mapping) and value:  # of an unknown section, its first key
                leaf, value = next(iter(value.items()))
                key += f".{leaf}"
            raise _unknown(key)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"configuration key {key!r} is a section, but {value!r} was given; set {key}.<key>"
                )
            section = typing.cast(type[Section], kind).section_for(value)
            arguments[name] = _build(section, value, f"{key}.")
        else:
            arguments[name] = of_kind(key, value, kind)
    return cls(**arguments)
