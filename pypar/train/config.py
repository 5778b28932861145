"""The configuration of a run: small frozen dataclasses, read from TOML and from ``key=value`` overrides.

Every key has a default; the defaults are the main job (Python's own library as text, bytes as tokens). An
unknown key, a value of the wrong type or a file that is not TOML is a ``ValueError`` with a sentence.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pypar.optimizers.config import OptimizerConfig

if TYPE_CHECKING:
    from pypar.models import DecoderConfig

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder; every number is the whole model's, never one rank's."""

    vocab_size: int = 0  # 0: the tokenizer's
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 0  # 0: d_model / num_heads
    d_ff: int = 704
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: str = "python-stdlib"  # a folder, a glob, a text file, a .jsonl file, or "python-stdlib"
    pattern: str = "*"  # which files of a folder (at any depth; hidden ones never)
    tokenizer: str = "bytes"  # or the path of a Hugging Face tokenizer.json
    # "text": "</s>" in the data or a prompt is text like any other. "parse": it is the token of that name, as where a
    # chat template wrote it. Documents end where records and files do, whatever tokens they hold.
    special_tokens: str = "text"
    validation_fraction: float = 0.05  # of the documents; a single document is split by position
    cache_directory: str = ""  # "": $XDG_CACHE_HOME/pypar or ~/.cache/pypar


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what to write on the way."""

    steps: int = 500
    batch_size: int = 8  # sequences a step, over all ranks
    microbatch_size: int = 2  # sequences
    sequence_length: int = 256  # tokens
    packed_documents: bool = (
        False  # tokens see their own document only, and do not predict the next one's first
    )
    precision: str = "fp32"  # or "bf16" with fp32 master weights
    evaluate_every: int = 50  # steps; 0: only at the end
    evaluate_batches: int = 4
    final_evaluate_batches: int = 32  # at the end of the run
    checkpoint_every: int = 100  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest so many; 0: all
    resume: str = ""  # "": start anew; "auto" (or true): the newest checkpoint of this run; or a path
    resume_data: str = "same"  # or "restart": of data, sequence length or seed that are not the checkpoint's
    sequence_parallel: bool = False
    threads: int = 0  # of one rank; 0: the machine's cores divided by its ranks
    sample_prompt: str = "class "
    sample_tokens: int = 200
    bucket_bytes: int = 25 << 20
    log_every: int = 25  # steps; where there is no terminal for a bar


@dataclass(frozen=True)
class PipelineConfig:
    schedule: str = "one_f_one_b"


@dataclass(frozen=True)
class ContextConfig:
    layout: str = "zigzag"  # or "contiguous", "striped"
    method: str = "ring"  # or "all_gather", "ulysses", "hybrid", "auto": the one that should be fastest
    ulysses_size: int = 0  # ranks that share heads in "hybrid"; 0: as many as there are key/value heads for


@dataclass(frozen=True)
class RunConfig:
    """One run. ``mesh`` is written like ``"tp=2,pp=2"``; empty puts every rank on the dp axis."""

    name: str = "stdlib"
    directory: str = "runs"
    seed: int = 0
    mesh: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of ``to_dict``; keys that are absent keep their defaults."""
        values = dict(values)
        if isinstance(values.get("mesh"), Mapping):  # [mesh] tp = 2 reads as well as mesh = "tp=2"
            values["mesh"] = ",".join(f"{name}={size}" for name, size in values["mesh"].items())
        train = values.get("train")
        if isinstance(train, Mapping) and isinstance(train.get("resume"), bool):
            values["train"] = {**train, "resume": "auto" if train["resume"] else ""}
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

    def decoder_config(self, vocab_size: int) -> "DecoderConfig":
        """The model's sizes with every 0 filled in; ``vocab_size`` is the tokenizer's."""
        from pypar.models import DecoderConfig

        return DecoderConfig(**dataclasses.asdict(filled_model(self.model, vocab_size)))


def filled_model(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """``model`` with vocab_size and head_size filled in where they are 0."""
    head_size = model.head_size
    if head_size == 0:
        if model.num_heads < 1 or model.d_model % model.num_heads:
            raise ValueError(
                f"model.d_model ({model.d_model}) must divide by model.num_heads ({model.num_heads}) where "
                "model.head_size is not given; set model.head_size or change either"
            )
        head_size = model.d_model // model.num_heads
    if model.vocab_size and model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size ({model.vocab_size}) must be at least the tokenizer's ({vocab_size}); use 0 "
            "to take the tokenizer's"
        )
    return dataclasses.replace(model, head_size=head_size, vocab_size=model.vocab_size or vocab_size)


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


def all_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key there is."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        keys += all_keys(kind, f"{prefix}{name}.") if section else [prefix + name]
    return keys


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
            arguments[name] = _build(typing.cast(type, kind), value, f"{key}.")
        else:
            arguments[name] = _checked(key, value, kind)
    return cls(**arguments)


def _checked(key: str, value: Any, kind: type | types.GenericAlias) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"configuration key {key!r} must be {TYPE_NAMES[typing.cast(type, kind)]}, not {value!r}"
        )
    return value
