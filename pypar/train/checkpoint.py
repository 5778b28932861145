"""Checkpoints on torch.distributed.checkpoint (DCP): written by any layout, read by any other.

A checkpoint is a folder ``step_00000100`` with DCP's files and ``complete.json``, the manifest: step, time of
writing, the caller's extra JSON, and the size of every file. It is written under another name
(``.partial``), flushed to disk and renamed by rank 0 when every rank has finished; a folder without a
manifest that agrees with its files is never taken for one. All files of a checkpoint must be seen by all
ranks (one file system).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pypar.layout import Layout
    from pypar.mesh import Mesh
    from pypar.models import DecoderConfig

MANIFEST = "complete.json"
PARTIAL = ".partial"
REPLACED = ".replaced"
REMEDY = "give the folder of a complete checkpoint (step_...) or of a run that has one"

State = Mapping[str, "tuple[Tensor, Layout]"]  # global name -> this rank's part, and which part that is


def save(directory: Path, step: int, state: State, mesh: "Mesh", extra: Mapping[str, Any]) -> Path:
    """Write ``directory/step_<step>`` from every rank; all ranks return when it is complete.

    state: name -> (local tensor, Layout). A name may be on some ranks only (pipeline stages); what several
    ranks hold alike is written once. extra: JSON values kept in the manifest.
    """
    import torch.distributed.checkpoint as dcp

    final = directory / f"step_{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    if mesh.world.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for old in (*directory.glob(f"step_*{PARTIAL}"), *directory.glob(f"step_*{REPLACED}")):
            shutil.rmtree(old)  # what an interrupted run left
        partial.mkdir()
    _barrier(mesh)
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, overwrite=False)
    with _quiet():
        dcp.save(_global_tensors(state, mesh), storage_writer=writer, no_dist=mesh.world.size == 1)
    if mesh.world.rank == 0:
        _complete(partial, final, {"step": step, "written_at": time.time_ns(), "extra": dict(extra)})
    _barrier(mesh)
    if not final.is_dir():
        raise RuntimeError(
            f"checkpoint {final} was not completed; the run directory must be one file system for all ranks"
        )
    return final


def load(path: Path, state: State, mesh: "Mesh") -> dict[str, Any]:
    """Fill the tensors of ``state`` in place from ``path``, whatever layout wrote it; returns the manifest.

    ValueError where the checkpoint is not complete, or lacks a tensor, or holds it in another shape.
    """
    import torch.distributed.checkpoint as dcp

    manifest = read_manifest(path)
    held = _held_shapes(path)
    for name, (_, layout) in state.items():
        if name not in held:
            near = ", ".join(sorted(held)[:3])
            raise ValueError(
                f"checkpoint {path} does not hold {name} (it holds {near}, ...); it is of another model"
            )
        if held[name] != tuple(layout.global_shape):
            raise ValueError(_other_shape(path, name, held[name], tuple(layout.global_shape)))
    reader = dcp.FileSystemReader(path)
    with _quiet():
        dcp.load(_global_tensors(state, mesh), storage_reader=reader, no_dist=mesh.world.size == 1)
    return manifest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a single process has no process group, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


def _global_tensors(state: State, mesh: "Mesh") -> dict[str, Any]:
    """DTensors that share memory with ``state``; plain tensors in a world of one."""
    from pypar.layout import to_dtensor

    if mesh.device_mesh is None:
        return {name: tensor for name, (tensor, _) in state.items()}
    return {name: to_dtensor(tensor, layout, mesh) for name, (tensor, layout) in state.items()}


def _barrier(mesh: "Mesh") -> None:
    import torch.distributed as dist

    if mesh.world.size > 1:
        dist.barrier(group=mesh.world.group)


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Check, describe and rename; at every moment either the whole checkpoint is there or none."""
    import torch.distributed.checkpoint as dcp

    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    expected = {
        info.relative_path
        for info in (dcp.FileSystemReader(partial).read_metadata().storage_data or {}).values()
    }
    missing = sorted(expected - set(files))
    if missing:
        raise RuntimeError(
            f"checkpoint {final} lacks {', '.join(missing)}: written, but not seen by rank 0; the run "
            "directory must be one file system for all ranks"
        )
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**manifest, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(partial)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _held_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    import torch.distributed.checkpoint as dcp

    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # a pickle: anything can be raised
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """step, written_at (ns since 1970), extra and files of a complete checkpoint.

    ValueError says what is wrong with one that is not complete.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist; {REMEDY}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, _ = manifest["files"], (manifest["step"], manifest["written_at"], manifest["extra"])
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint: it has no {MANIFEST}; {REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: its {MANIFEST} is damaged ({error!r}); {REMEDY}"
        ) from error
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"checkpoint {path} cannot be read: {name} {state}; {REMEDY}")
    return manifest


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``."""
    return read_manifest(path)["extra"]


def check_readable(path: Path, model: "DecoderConfig | None" = None) -> dict[str, Any]:
    """The manifest of ``path``, read without any rank; ValueError where it is damaged or not of ``model``."""
    manifest = read_manifest(path)
    held = _held_shapes(path)
    if model is None:
        return manifest
    written = manifest["extra"].get("config", {}).get("model", {})
    for key, value in dataclasses.asdict(model).items():
        if written.get(key, value) not in (value, 0):  # 0: follows from the tokenizer or from the other sizes
            raise ValueError(
                f"checkpoint {path} holds a model with {key} = {written[key]} but the configuration says "
                f"{value}; set model.{key}={written[key]} or start a run of another name"
            )
    name, shape = "model.embedding.weight", (model.vocab_size, model.d_model)
    if held.get(name, shape) != shape:
        raise ValueError(_other_shape(path, name, held[name], shape))
    return manifest


def _other_shape(path: Path, name: str, held: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"checkpoint {path} holds {name} of shape {list(held)} but the model has {list(expected)}; "
        "resume with the model and tokenizer that wrote it"
    )


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
