"""The index of a checkpoint: which tensors it holds, and in which boxes of which files their parts are.

A box is a part of a tensor, [offsets, offsets + lengths), stored as one entry of one file. The boxes of a tensor
cover each of its elements exactly once; a tensor without elements has none. As JSON:

    {"format": "pypar checkpoint", "version": 1, "tensors": {"model.norm.weight": {
        "dtype": "F32", "shape": [64],
        "boxes": [{"offsets": [0], "lengths": [64], "file": "rank_00000.safetensors", "entry": "model.norm.weight"}]}}}
"""

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pypar.files.json import read_json
from pypar.files.tensors import DTYPES, MOST_ELEMENTS, Entry, as_sizes

INDEX = "index.json"
FORMAT, VERSION = "pypar checkpoint", 1
MOST_BYTES = 32 << 20
MOST_CORNERS = 1 << 21  # of all tensors and boxes: 2^dims each
FILE_NAME = re.compile(r"rank_\d{5,9}\.safetensors")


@dataclass(frozen=True)
class Box:
    """Part of a tensor: where it is in the whole (``offsets``, ``lengths``) and in the files."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    file: str
    entry: str


@dataclass(frozen=True)
class IndexedTensor:
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


Index = Mapping[str, IndexedTensor]


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def entry_name(name: str, shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> str:
    """The tensor's own name where the box is all of it, else with the part: ``w[0:8,16:32]``."""
    if tuple(lengths) == tuple(shape):
        return name
    return f"{name}[{','.join(f'{o}:{o + n}' for o, n in zip(offsets, lengths, strict=True))}]"


def write_index(folder: Path, index: Index) -> None:
    """Write ``folder``'s index, by which its files become a checkpoint: it is renamed to its name when it is whole."""
    check_index(index)
    tensors = {name: asdict(tensor) for name, tensor in sorted(index.items())}
    text = json.dumps({"format": FORMAT, "version": VERSION, "tensors": tensors}, separators=(",", ":"))
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"the index of {folder} would have {len(text):,} bytes, more than the {MOST_BYTES:,} that are read; "
            "give tensors shorter names or cut them into fewer parts"
        )
    partial = folder / f"{INDEX}.partial"
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, folder / INDEX)


def read_index(folder: Path) -> Index:
    """The index of ``folder``; ValueError with a sentence where there is none or it cannot be right."""
    try:
        value = read_json(folder / INDEX, MOST_BYTES, follow_symlink=False)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if value.get("version") != VERSION:
            raise ValueError(f"it is of version {str(value.get('version'))[:40]}, and {VERSION} is read")
        if not isinstance(value.get("tensors"), dict):
            raise ValueError("it has no table of tensors")
        index = {name: _tensor(name, described) for name, described in value["tensors"].items()}
        check_index(index)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder} has no {INDEX}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read: its {INDEX} is damaged: {error}") from None
    return index


def _tensor(name: str, described: Any) -> IndexedTensor:
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "boxes"}:
        raise ValueError(f"tensor {shown(name)} is described by something else than dtype, shape and boxes")
    dtype, shape, boxes = described["dtype"], as_sizes(described["shape"]), described["boxes"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {shown(name)} has a dtype that is not one of {', '.join(DTYPES)}")
    if shape is None:
        raise ValueError(f"tensor {shown(name)} has a shape that is none")
    if not isinstance(boxes, list):
        raise ValueError(f"tensor {shown(name)} has no list of boxes")
    return IndexedTensor(dtype, shape, tuple(_box(name, box) for box in boxes))


def _box(name: str, described: Any) -> Box:
    if not isinstance(described, dict) or set(described) != {"offsets", "lengths", "file", "entry"}:
        raise ValueError(f"a box of {shown(name)} is something else than offsets, lengths, file and entry")
    offsets, lengths = as_sizes(described["offsets"]), as_sizes(described["lengths"])
    file, entry = described["file"], described["entry"]
    if offsets is None or lengths is None:
        raise ValueError(f"a box of {shown(name)} has offsets or lengths that are none")
    if not isinstance(file, str) or not isinstance(entry, str):
        raise ValueError(f"a box of {shown(name)} names no file and entry")
    return Box(offsets, lengths, file, entry)


def check_index(index: Index) -> None:
    """ValueError with half a sentence unless every tensor is covered once by boxes in files of a rank's name."""
    corners = sum((1 + len(t.boxes)) << len(t.shape) for t in index.values())
    if corners > MOST_CORNERS:
        raise ValueError(
            f"its tensors and boxes have {corners:,} corners, more than the {MOST_CORNERS:,} that are read"
        )
    for name, tensor in index.items():
        if math.prod(tensor.shape) > MOST_ELEMENTS:
            raise ValueError(f"tensor {shown(name)} of shape {list(tensor.shape)} is too large to be one")
        for box in tensor.boxes:
            _check_box(name, tensor, box)
        if not _covered_once(tensor):
            held = sum(math.prod(box.lengths) for box in tensor.boxes)
            how = "overlap" if held >= math.prod(tensor.shape) else "leave gaps"
            raise ValueError(f"the boxes of {shown(name)}, of shape {list(tensor.shape)}, {how}")


def _check_box(name: str, tensor: IndexedTensor, box: Box) -> None:
    if not FILE_NAME.fullmatch(box.file):
        raise ValueError(f"a box of {shown(name)} is in {shown(box.file)}, which is no file of a rank")
    inside = len(box.offsets) == len(box.lengths) == len(tensor.shape) and all(
        o + n <= size for o, n, size in zip(box.offsets, box.lengths, tensor.shape, strict=True)
    )
    if not inside:
        raise ValueError(
            f"a box of {shown(name)} at {list(box.offsets)} of size {list(box.lengths)} is not inside the tensor's "
            f"shape {list(tensor.shape)}"
        )


def _covered_once(tensor: IndexedTensor) -> bool:
    """Whether every element is in exactly one box.

    The corners of a box, counted +1 or -1 by how many of their coordinates are ends, are the mixed difference of its
    indicator function, which determines the function: boxes cover the tensor once exactly where their signed
    corners cancel, but for those of the whole. That takes no comparison of boxes with each other.
    """
    if len(tensor.boxes) == 1:
        return tensor.boxes[0].lengths == tensor.shape  # and inside, as was checked before
    count: Counter[tuple[int, ...]] = Counter()
    _add_corners(count, (0,) * len(tensor.shape), tensor.shape, -1)
    for box in tensor.boxes:
        _add_corners(count, box.offsets, box.lengths, 1)
    return not any(count.values())


def _add_corners(
    count: Counter[tuple[int, ...]], offsets: tuple[int, ...], lengths: tuple[int, ...], sign: int
) -> None:
    for ends in itertools.product((0, 1), repeat=len(offsets)):
        corner = tuple(o + n * end for o, n, end in zip(offsets, lengths, ends, strict=True))
        count[corner] += -sign if sum(ends) % 2 else sign


def checked_entry(entries: dict[str, Entry], box: Box, dtype: str) -> Entry:
    """The entry of a box; ValueError with half a sentence where the file does not hold it as the index says."""
    entry = entries.get(box.entry)
    if entry is None:
        raise ValueError(f"it does not hold {shown(box.entry)}")
    if (entry.dtype, entry.shape) != (dtype, box.lengths):
        raise ValueError(
            f"it holds {shown(box.entry)} as {entry.dtype} {list(entry.shape)}, but the index says {dtype} "
            f"{list(box.lengths)}"
        )
    return entry


def shown(name: str) -> str:
    """A name from a file, for a sentence: quoted, without control characters, not longer than a line."""
    return repr(name if len(name) <= 100 else name[:100] + "...")
