"""Storage for torch.distributed.checkpoint (DCP) in files that hold no code: safetensors and a JSON index.

    dcp.save(state, storage_writer=SafetensorsWriter(folder))
    dcp.load(state, storage_reader=SafetensorsReader(folder))

DCP plans who writes and who reads what, so any sharding loads any other; these two move the bytes. Each rank writes
one file, and the index makes the folder a checkpoint. Only tensors are stored: DCP would pickle anything else.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pypar.files.tensors import DTYPES, METADATA, Entry, dtype_name, open_tensors, read_slice, write
from pypar.train.checkpoint.index import (
    INDEX,
    Box,
    Index,
    IndexedTensor,
    checked_entry,
    entry_name,
    file_name,
    read_index,
    write_index,
)

# Bytes are moved as whole numbers of their size, for numpy does not know every dtype.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _InFolder:
    """A checkpoint is a folder, which torch calls its id."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)


class SafetensorsWriter(_InFolder, StorageWriter):
    """Writes a new checkpoint into ``folder``, which may exist but must hold no index."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "one index describes all ranks' files: SafetensorsWriter needs use_collectives=True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if (self.folder / INDEX).exists():
            raise ValueError(f"{self.folder} already holds a checkpoint; write to another folder")
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise ValueError(
                    f"{item.index.fqn} is not a tensor, and a checkpoint holds tensors only; make it one or keep it "
                    "as JSON elsewhere"
                )
            if dtype_name(item.tensor_data.properties.dtype) is None:
                raise ValueError(
                    f"{item.index.fqn} is of {item.tensor_data.properties.dtype}, which safetensors does not hold; "
                    f"use one of {', '.join(name for name, _ in DTYPES.values())}"
                )
            if item.index.fqn == METADATA:
                raise ValueError(f"a tensor cannot be named {METADATA!r}, which safetensors keeps for itself")
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=file_name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Wide elements first, so that every tensor of the file begins at a multiple of its element's size.
        items = sorted((i for i in plan.items if _box_of(i)[0].num_bytes), key=_itemsize, reverse=True)
        entries, results = {}, []
        for item in items:
            entry, box = _box_of(item, plan.storage_data)
            if box.entry in entries:
                raise ValueError(
                    f"two parts of the state would be named {box.entry!r} in {box.file}; rename one"
                )
            entries[box.entry] = entry
            results.append(WriteResult(item.index, entry.num_bytes, box))
        if items:
            write(self.folder / plan.storage_data, entries, _contents(items, planner))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        boxes: dict[str, list[Box]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            boxes[result.index.fqn].append(result.storage_data)
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # the local plans were refused otherwise
            ordered = sorted(boxes[name], key=lambda box: box.offsets)
            index[name] = IndexedTensor(_stored(tensor.properties), tuple(tensor.size), tuple(ordered))
        write_index(self.folder, index)


def _stored(properties: TensorProperties) -> str:
    """The files' name of the dtype, which the local plans were asked for."""
    name = dtype_name(properties.dtype)
    assert name is not None
    return name


def _itemsize(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype.itemsize


def _box_of(item: WriteItem, file: str = "") -> tuple[Entry, Box]:
    """What the file holds of ``item``, and where that is in the whole tensor."""
    data = item.tensor_data
    assert data is not None and data.chunk is not None
    offsets, lengths = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    name = entry_name(item.index.fqn, data.size, offsets, lengths)
    return Entry(_stored(data.properties), lengths), Box(offsets, lengths, file, name)


def _contents(items: list[WriteItem], planner: SavePlanner) -> Iterator[np.ndarray]:
    """The bytes of each item; one tensor at a time is copied, and only where it is on a device or has gaps."""
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class _StoredBox:
    """A box, and its dtype by the files' name of it."""

    box: Box
    dtype: str


class SafetensorsReader(_InFolder, StorageReader):
    """Reads from a checkpoint the slices that this rank needs; ValueError where its index cannot be right.

    The index is read when the reader is made, so that a damaged one is refused before any rank waits for another.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(folder)
        self.index: Index = read_index(self.folder)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        super().reset(checkpoint_id)
        if checkpoint_id is not None:
            self.index = read_index(self.folder)

    def read_metadata(self) -> Metadata:
        tensors, places = {}, {}
        for name, tensor in self.index.items():
            full = [box for box in tensor.boxes if 0 not in box.lengths]
            tensors[name] = TensorStorageMetadata(
                TensorProperties(getattr(torch, DTYPES[tensor.dtype][0])),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths)) for box in full],
            )
            for box in full:
                places[MetadataIndex(name, box.offsets)] = _StoredBox(box, tensor.dtype)
        return Metadata(dict(tensors), storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.places: dict[MetadataIndex, _StoredBox] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise ValueError(
                    f"{item.dest_index.fqn} is not a tensor, and a checkpoint holds tensors only"
                )
            of_file.setdefault(self.places[item.storage_index].box.file, []).append(item)
        for name, items in sorted(of_file.items()):
            try:
                self._read_file(self.folder / name, items, planner)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"checkpoint {self.folder} cannot be read: {name} is damaged: {error}"
                ) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        file, entries = open_tensors(path)
        with file:
            for item in items:
                place = self.places[item.storage_index]
                entry = checked_entry(entries, place.box, place.dtype)
                target = planner.resolve_tensor(item).detach()
                dtype = getattr(torch, DTYPES[entry.dtype][0])
                direct = target.device.type == "cpu" and target.dtype == dtype
                read = target if direct else torch.empty(tuple(item.lengths), dtype=dtype)
                itemsize = dtype.itemsize
                out = read.view(_INTEGERS[itemsize]).numpy()
                read_slice(file, entry, tuple(item.storage_offsets), tuple(item.lengths), out)
                if not direct:
                    target.copy_(read)
                planner.commit_tensor(item, target)
