"""Files of tensors in the format safetensors, which has no code in it: written as a stream, read by slices.

A file is 8 bytes (the length of the header, little-endian), the header (JSON: name -> dtype, shape and the first
and last byte) and the tensors' bytes, row-major, one after the other. The format is simple enough to be written
here: the library safetensors needs every tensor of a file on the CPU at once, this writer one at a time.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pypar.files.json import open_plain, parse_json, read_exactly, read_into

MOST_HEADER_BYTES = 32 << 20  # about 300,000 tensors
MOST_ELEMENTS = 1 << 60
READAHEAD_BYTES = 128 << 10  # of Linux, by default
METADATA = "__metadata__"  # the one name that is no tensor's

# The format's name of a dtype: torch's, bytes of an element.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_NAMES = {name: stored for stored, (name, _) in DTYPES.items()}


def dtype_name(dtype: object) -> str | None:
    """The format's name of a torch.dtype; None where it has none."""
    return _NAMES.get(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where it stands (``position``, in bytes from the file's start) and what it is."""

    dtype: str
    shape: tuple[int, ...]
    position: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


class TensorFile:
    """A new file, written one tensor at a time in any order, under another name until it is whole and on the disk.

    ``entries`` are the tensors in the file's order, wide elements first, so that each begins at a multiple of its size.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._missing = dict(entries)
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {METADATA: {"format": "pt"}}  # which Hugging Face's readers ask for
        end = 0
        for name, entry in entries.items():
            self._starts[name], end = end, end + entry.num_bytes
            offsets = [self._starts[name], end]
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MOST_HEADER_BYTES:
            raise ValueError(
                f"{path} would have a header of {len(text):,} bytes, more than {MOST_HEADER_BYTES:,}"
            )
        self._begin = 8 + len(text)
        self._partial.unlink(missing_ok=True)
        self._file = self._partial.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """``array``: the tensor's bytes (uint8)."""
        entry = self._missing.pop(name)
        if array.nbytes != entry.num_bytes:
            raise RuntimeError(f"{self._path}: {array.nbytes} bytes were given for a tensor of {entry}")
        self._file.seek(self._begin + self._starts[name])
        self._file.write(array.data)

    def finish(self) -> None:
        assert not self._missing, f"{sorted(self._missing)} were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)


def write(path: Path, entries: Mapping[str, Entry], data: Iterable[np.ndarray]) -> None:
    """Write a new file, flushed to disk. ``data``: each entry's bytes (uint8), in the order of ``entries``."""
    file = TensorFile(path, entries)
    for name, array in zip(entries, data, strict=True):
        file.write(name, array)
    file.finish()


def open_tensors(path: Path) -> tuple[BinaryIO, dict[str, Entry]]:
    """The open file and what its header says; ValueError with half a sentence where that cannot be true."""
    file = open_plain(path, follow_symlink=False)
    try:
        return file, _read_header(file)
    except BaseException:
        file.close()
        raise


def _read_header(file: BinaryIO) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(read_exactly(file, 0, 8), "little")
    if length > MOST_HEADER_BYTES or length > size - 8:
        raise ValueError(
            f"its header claims {length:,} bytes, but the file has {size:,} and {MOST_HEADER_BYTES:,} are read"
        )
    header = parse_json(read_exactly(file, 8, length))
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    header.pop(METADATA, None)
    spans, entries = [], {}
    for name, described in header.items():
        entries[name], span = _entry(name, described, 8 + length)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(start, end):,} of the data")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end:,} bytes, but the file holds {size - 8 - length:,} of them")
    return entries


def _entry(name: str, described: Any, first: int) -> tuple[Entry, tuple[int, int]]:
    """An entry of the header, and its span of the data, which begins at byte ``first`` of the file."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"its header describes {name[:80]!r} by something else than dtype, shape and data_offsets"
        )
    dtype, span = described["dtype"], described["data_offsets"]
    shape = as_sizes(described["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"its header gives {name[:80]!r} a dtype that is not one of {', '.join(DTYPES)}")
    if shape is None or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"its header gives {name[:80]!r} a shape that is none")
    bounds = as_sizes(span)
    if bounds is None or len(bounds) != 2:
        raise ValueError(f"its header gives {name[:80]!r} data_offsets that are none")
    entry = Entry(dtype, shape, first + bounds[0])
    if bounds[1] - bounds[0] != entry.num_bytes:
        raise ValueError(
            f"its header gives {name[:80]!r} of shape {list(shape)} in {dtype} {bounds[1] - bounds[0]:,} bytes "
            f"instead of {entry.num_bytes:,}"
        )
    return entry, (bounds[0], bounds[1])


def as_sizes(value: Any) -> tuple[int, ...] | None:
    """A JSON list of whole numbers from 0 to 2^60, at most 64 of them, as a tuple; None where it is not that."""
    if not isinstance(value, list) or len(value) > 64:
        return None
    if not all(type(v) is int and 0 <= v <= MOST_ELEMENTS for v in value):
        return None
    return tuple(value)


def read_slice(
    file: BinaryIO, entry: Entry, offsets: Sequence[int], lengths: Sequence[int], out: np.ndarray
) -> None:
    """Read ``entry[offsets : offsets + lengths]`` into ``out`` (integers of the element's size, any strides).

    What is one stretch of the file is read straight into ``out``; of other slices only the pages that they touch
    are mapped.
    """
    itemsize, shape = out.dtype.itemsize, entry.shape
    if not out.size:
        return
    strides = [itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = entry.position + sum(o * s for o, s in zip(offsets, strides, strict=True))
    cut = max((dim for dim, length in enumerate(lengths) if length != shape[dim]), default=0)
    if all(length == 1 for length in lengths[:cut]):
        stretch = out if out.flags.c_contiguous else np.empty(tuple(lengths), out.dtype)
        read_into(file, first, stretch.reshape(-1).view(np.uint8).data)
        if stretch is not out:
            out[...] = stretch
        return
    end = first + sum((n - 1) * s for n, s in zip(lengths, strides, strict=True)) + itemsize
    if end > os.fstat(file.fileno()).st_size:  # pages past the end would kill the process
        raise ValueError(f"it ends before byte {end:,}")
    page = first // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file.fileno(), end - page, offset=page, access=mmap.ACCESS_READ) as mapped:
        if strides[cut - 1] > READAHEAD_BYTES:  # what the kernel would read beside a page would not be used
            mapped.madvise(mmap.MADV_RANDOM)
        source: np.ndarray = np.ndarray(tuple(lengths), out.dtype, mapped, first - page, tuple(strides))
        out[...] = source
        del source  # the mapping closes only when nothing points into it
