"""Checkpoint folders as they lie on disk: which are complete, the newest, what is wrong with others.

Nothing here needs torch or a rank: a run is refused before any is started.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypar.files.json import read_json
from pypar.files.tensors import open_tensors
from pypar.train.checkpoint.index import FILE_NAME, INDEX, Index, checked_entry, read_index, shown

if TYPE_CHECKING:
    from pypar.models.family import Sizes

MANIFEST = "complete.json"
MOST_BYTES = 4 << 20
PICKLED_METADATA = ".metadata"  # of checkpoints that pypar wrote before, and of torch's own
PARTIAL = ".partial"
REPLACED = ".replaced"
REMEDY = "give the folder of a complete checkpoint (step_...) or of a run that has one"


def read_manifest(path: Path) -> dict[str, Any]:
    """step, written_at (ns since 1970), extra and files of a complete checkpoint.

    ValueError says what is wrong with one that is not complete.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist; {REMEDY}")
    if (path / PICKLED_METADATA).exists() and not (path / INDEX).exists():
        raise ValueError(
            f"checkpoint {path} is of an earlier format, whose {PICKLED_METADATA} is a pickle: reading it could run "
            "any code that its writer put there, so it is not read; finish its run with the version of pypar that "
            "wrote it, or start a run of another name"
        )
    try:
        manifest = read_json(path / MANIFEST, MOST_BYTES, follow_symlink=False)
        files = _checked(manifest)
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint: it has no {MANIFEST}; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: its {MANIFEST} is damaged ({error}); {REMEDY}"
        ) from None
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() and not file.is_symlink() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"checkpoint {path} cannot be read: {name} {state}; {REMEDY}")
    return manifest


def _checked(manifest: Any) -> dict[str, int]:
    """The files of a manifest that is as `save` writes it."""
    kinds = {"step": int, "written_at": int, "extra": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest, dict) or type(manifest.get(key)) is not kind:
            raise ValueError(f"it has no {key}")
    if not 0 <= manifest["step"] < 1 << 60:
        raise ValueError("its step is none")
    files = manifest["files"]
    for name, size in files.items():
        if name != INDEX and not FILE_NAME.fullmatch(name):
            raise ValueError(f"it names {shown(name)}, which is no file of a checkpoint")
        if type(size) is not int:
            raise ValueError(f"the size of {name} is none")
    if INDEX not in files:
        raise ValueError(f"it does not name {INDEX}")
    return files


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``."""
    return read_manifest(path)["extra"]


def check_readable(path: Path, model: "Sizes | None" = None, *, headers: bool = True) -> dict[str, Any]:
    """The manifest of ``path``, read without any rank; ValueError where it is damaged or not of ``model``.

    headers: also look into each file; where many ranks check at once, each looks into those that it reads.
    """
    manifest = read_manifest(path)
    index = read_index(path)
    missing = {box.file for tensor in index.values() for box in tensor.boxes} - set(manifest["files"])
    if missing:
        raise ValueError(f"checkpoint {path} cannot be read: its {MANIFEST} does not name {min(missing)}")
    if headers:
        _check_headers(path, index)
    if model is not None:
        _check_model(path, manifest["extra"], index, model)
    return manifest


def _check_headers(path: Path, index: Index) -> None:
    """Whether the files hold what the index says."""
    of_file: dict[str, list] = {}
    for tensor in index.values():
        for box in tensor.boxes:
            of_file.setdefault(box.file, []).append((box, tensor.dtype))
    for name, boxes in sorted(of_file.items()):
        try:
            file, entries = open_tensors(path / name)
            file.close()
            for box, dtype in boxes:
                checked_entry(entries, box, dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"checkpoint {path} cannot be read: {name} is damaged: {error}; {REMEDY}"
            ) from None


def _check_model(path: Path, extra: Mapping[str, Any], index: Index, model: "Sizes") -> None:
    """Whether a model of these sizes can be filled from the checkpoint, found out before it is made."""
    config = extra.get("config")
    written = config.get("model") if isinstance(config, dict) else None
    written = written if isinstance(written, dict) else {}
    sizes: Any = model
    for key, value in dataclasses.asdict(sizes).items():
        held = written.get(key, value)
        follows = key in model.filled_in and type(held) is int and held == 0
        if not follows and (held != value or isinstance(held, bool) != isinstance(value, bool)):
            raise ValueError(
                f"checkpoint {path} holds a model with {key} = {shown_value(held)} but the configuration says "
                f"{shown_value(value)}; set model.{key}={shown_value(held)} or start a run of another name"
            )
    check_shapes(path, index, {f"model.{name}": shape for name, shape in model.outer_shapes.items()})
    held = sum(math.prod(tensor.shape) for name, tensor in index.items() if name.startswith("model."))
    if held != model.num_parameters:
        raise ValueError(
            f"checkpoint {path} holds {held:,} weights but the model of the configuration has "
            f"{model.num_parameters:,}; resume with the model and tokenizer that wrote it"
        )


def check_shapes(path: Path, index: Index, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the checkpoint holds a tensor of each name, in that shape."""
    for name, shape in shapes.items():
        if name not in index:
            near = ", ".join(shown(other) for other in sorted(index)[:3]) or "none"
            raise ValueError(
                f"checkpoint {path} does not hold {name} (it holds {near}, ...); it is of another model"
            )
        if index[name].shape != tuple(shape):
            raise ValueError(
                f"checkpoint {path} holds {name} of shape {list(index[name].shape)} but the model has "
                f"{list(shape)}; resume with the model and tokenizer that wrote it"
            )


def shown_value(value: Any) -> str:
    """A value of the configuration as it is written there, at most a line of it."""
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else repr(value)
        if isinstance(value, str)
        else str(value)
    )
    return text if len(text) <= 100 else f"{text[:100]}..."


def survey(directory: Path) -> tuple[list[Path], list[str]]:
    """The complete checkpoints of ``directory``, the last written first, and what is wrong with others.

    Not by step: a run that was resumed from an older one writes lower steps. One that was being written when
    the run ended is no fault, and not counted.
    """
    found, faults = [], []
    for path in sorted(directory.glob("step_*")):
        if path.suffix not in (PARTIAL, REPLACED):
            try:
                found.append((read_manifest(path)["written_at"], path))
            except ValueError as error:
                faults.append(str(error))
    return [path for _, path in sorted(found, reverse=True)], faults


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of ``directory`` that was written last; None where there is none."""
    return next(iter(survey(directory)[0]), None)


def resolve(path: Path) -> Path:
    """``path`` itself, or the newest checkpoint where it is a run's folder."""
    for directory in (path / "checkpoints", path):
        if directory.is_dir() and not (path / MANIFEST).exists():
            newest = latest(directory)
            if newest is not None:
                return newest
    return path


def keep_newest(directory: Path, count: int) -> None:
    """Delete all but the ``count`` checkpoints written last (0: none). Called by every rank; rank 0 acts."""
    import torch.distributed as dist

    if count < 1 or (dist.is_initialized() and dist.get_rank() != 0):
        return
    for path in survey(directory)[0][count:]:
        doomed = path.with_name(path.name + REPLACED)
        os.rename(path, doomed)  # first, so that no moment shows half a checkpoint
        shutil.rmtree(doomed)
