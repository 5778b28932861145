"""Writing and reading the state of a run from every rank, by torch.distributed.checkpoint (DCP)."""

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypar.train.checkpoint.index import INDEX, read_index
from pypar.train.checkpoint.manifest import (
    MANIFEST,
    MOST_BYTES,
    PARTIAL,
    REPLACED,
    check_shapes,
    read_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pypar.layout import Layout
    from pypar.mesh import Mesh

State = Mapping[str, "tuple[Tensor, Layout]"]  # global name -> this rank's part, and which part that is


def save(directory: Path, step: int, state: State, mesh: "Mesh", extra: Mapping[str, Any]) -> Path:
    """Write ``directory/step_<step>`` from every rank; all ranks return when it is complete.

    state: name -> (local tensor, Layout). A name may be on some ranks only (pipeline stages); what several
    ranks hold alike is written once. extra: JSON values kept in the manifest; ValueError where they are not.
    RuntimeError names the rank that could not write, and why.
    """
    import torch.distributed.checkpoint as dcp

    from pypar.train.checkpoint.storage import SafetensorsWriter

    size = len(json.dumps(extra, allow_nan=False))
    if size > MOST_BYTES // 2:
        raise ValueError(
            f"extra has {size:,} bytes as JSON and a checkpoint keeps {MOST_BYTES // 2:,}; keep less"
        )
    final = directory / f"step_{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    _by_first_rank(lambda: _prepare(directory, partial), final, mesh)
    with _plain_errors(f"checkpoint {final} cannot be written"):
        dcp.save(_stored(state, mesh), storage_writer=SafetensorsWriter(partial))
    manifest = {"step": step, "written_at": time.time_ns(), "extra": extra}
    _by_first_rank(lambda: _complete(partial, final, manifest), final, mesh)
    if not final.is_dir():
        raise RuntimeError(
            f"checkpoint {final} was not completed; the run directory must be one file system for all ranks"
        )
    return final


def load(path: Path, state: State, mesh: "Mesh") -> dict[str, Any]:
    """Fill the tensors of ``state`` in place from ``path``, whatever layout wrote it; returns the manifest.

    ValueError where the checkpoint is not complete or damaged, or lacks a tensor, or holds it in another shape.
    """
    import torch.distributed.checkpoint as dcp

    from pypar.train.checkpoint.storage import SafetensorsReader

    refused = ""
    try:
        manifest, reader = read_manifest(path), SafetensorsReader(path)
        check_shapes(path, reader.index, {name: layout.global_shape for name, (_, layout) in state.items()})
    except ValueError as error:
        refused = str(error)
    _refuse_together(refused, mesh)
    with _plain_errors(f"checkpoint {path} cannot be read"):
        dcp.load(_stored(state, mesh), storage_reader=reader)
    return manifest


@contextlib.contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """DCP's CheckpointException is no Exception: the error of the first rank that failed is raised in its place.

    And without DCP's warning that a single process has no process group, which is meant.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
            )
            yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        if isinstance(error, ValueError):
            raise ValueError(str(error)) from error
        raise RuntimeError(f"{what}: rank {rank}: {type(error).__name__}: {error}") from error


def _stored(state: State, mesh: "Mesh") -> dict[str, Any]:
    """Tensors that share memory with ``state`` and tell DCP which boxes of the whole ones they are."""
    from pypar.sharded.checkpointable import Stored

    return {name: Stored.of(tensor, layout, mesh) for name, (tensor, layout) in state.items()}


def _by_first_rank(act: Callable[[], None], final: Path, mesh: "Mesh") -> None:
    """Rank 0 acts, and all ranks go on when it has; where it cannot, all raise what it met."""
    import torch.distributed as dist

    failed = [""]
    if mesh.world.rank == 0:
        try:
            act()
        except (OSError, ValueError, RuntimeError) as error:
            failed = [f"checkpoint {final} cannot be written: rank 0: {type(error).__name__}: {error}"]
    if mesh.world.size > 1:
        dist.broadcast_object_list(failed, src=0, group=mesh.world.group)
    if failed[0]:
        raise RuntimeError(failed[0])


def _refuse_together(refused: str, mesh: "Mesh") -> None:
    """ValueError on every rank where one refuses ("": it does not), as its stage of a pipeline may be another's."""
    import torch.distributed as dist

    sentences = [refused]
    if mesh.world.size > 1:
        sentences = [""] * mesh.world.size
        dist.all_gather_object(sentences, refused, group=mesh.world.group)
    for sentence in filter(None, sentences):
        raise ValueError(sentence)


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob(f"step_*{PARTIAL}"), *directory.glob(f"step_*{REPLACED}")):
        shutil.rmtree(old)  # what an interrupted run left
    partial.mkdir()


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Check, describe and rename; at every moment either the whole checkpoint is there or none."""
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    expected = {INDEX, *(box.file for tensor in read_index(partial).values() for box in tensor.boxes)}
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
