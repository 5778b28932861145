"""Memory on a disk: bytes of this process in a file without a name, read and written in the background.

The file passes the page cache by (O_DIRECT) where its file system can, for a cache would keep in memory what was put
away to save it. It has no name, so no other run finds it, and it is gone when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import mmap
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK_BYTES = 4096  # what O_DIRECT wants places, lengths and addresses to be multiples of, at most
QUEUE_DEPTH = 32  # pieces of 4 MiB that are on their way at once
NUM_THREADS = 8  # where there is no io_uring

_UNKNOWN_TO_THE_FILE_SYSTEM = (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
_IN_MEMORY = "tmpfs"


def in_blocks(num_bytes: int) -> int:
    """The least multiple of BLOCK_BYTES that holds so many bytes."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def aligned(num_bytes: int) -> np.ndarray:
    """Bytes that begin at a multiple of BLOCK_BYTES."""
    whole = np.empty(num_bytes + BLOCK_BYTES, np.uint8)
    begin = -whole.ctypes.data % BLOCK_BYTES
    return whole[begin : begin + num_bytes]


class Started(NamedTuple):
    """A read or a write that is under way; `wait` returns when it is over.

    OSError, with the place, the offset and the bytes, for what the disk did not do.
    """

    room: Room
    request: Any
    offset: int
    buffer: np.ndarray  # which must live until then
    is_write: bool

    def wait(self) -> None:
        done, error = self.room.disk.queue.wait(self.request)
        if not error and done < self.buffer.nbytes:
            error = errno.EIO
        if error:
            what = "writing" if self.is_write else "reading"
            raise OSError(
                error,
                f"{what} {self.buffer.nbytes:,} bytes at offset {self.offset:,} of {self.room} failed after {done:,} "
                f"bytes: {os.strerror(error)}; what was there is lost, go on from a checkpoint",
            )


class Disk:
    """The folder ``directory`` of a disk, and the queue of what is being read and written there.

    owner  who this is for, as errors say it: "rank 3"
    kind   "io_uring" or "threads"; None: the former where the system has and allows it

    ValueError: a folder that is not there, is no folder or may not be written to. It warns of one that lies in memory.
    """

    def __init__(self, directory: Path, *, owner: str, kind: str | None = None) -> None:
        self.directory, self.owner = directory, owner
        check_folder(directory)
        self.is_direct, self.is_in_memory = True, _file_system(directory) == _IN_MEMORY
        if self.is_in_memory:
            warnings.warn(
                f"{directory} lies in memory ({_IN_MEMORY}), where states take the room that they are to leave; name a "
                "folder of a local disk",
                stacklevel=3,
            )
        self.kind, self.queue = _queue(kind)

    @property
    def way(self) -> str:
        """How bytes travel, in words."""
        past = (
            "past the page cache" if self.is_direct else "through the page cache, which its file system needs"
        )
        memory = (
            f"; THIS FOLDER LIES IN MEMORY ({_IN_MEMORY}), where nothing is saved"
            if self.is_in_memory
            else ""
        )
        return f"{self.directory} by {self.kind}, {past}{memory}"

    def room(self, num_bytes: int) -> Room:
        """So many bytes and more, in whole blocks, all taken from the disk at once; they begin as zeros.

        ValueError: too little room.
        """
        descriptor, is_direct = _open_without_name(self.directory)
        self.is_direct &= is_direct
        room = Room(self, descriptor, in_blocks(num_bytes))
        _reserve(descriptor, room.num_bytes, self.directory)
        return room


class Room:
    """A file without a name, which is gone with this object."""

    def __init__(self, disk: Disk, descriptor: int, num_bytes: int) -> None:
        self.disk, self.descriptor, self.num_bytes = disk, descriptor, num_bytes

    def __str__(self) -> str:
        return f"the file of {self.disk.owner} in {self.disk.directory}"

    def read_start(self, offset: int, buffer: np.ndarray) -> Started:
        """Fill ``buffer`` (uint8, `aligned`, a whole number of blocks) from ``offset`` on."""
        return self._start(offset, buffer, is_write=False)

    def write_start(self, offset: int, buffer: np.ndarray) -> Started:
        """Write ``buffer``, which must not change meanwhile, to ``offset``."""
        return self._start(offset, buffer, is_write=True)

    def _start(self, offset: int, buffer: np.ndarray, *, is_write: bool) -> Started:
        address = buffer.ctypes.data
        assert not (offset % BLOCK_BYTES or buffer.nbytes % BLOCK_BYTES or address % BLOCK_BYTES)
        assert 0 <= offset <= offset + buffer.nbytes <= self.num_bytes
        request = self.disk.queue.start(is_write, self.descriptor, address, buffer.nbytes, offset)
        return Started(self, request, offset, buffer, is_write)

    def mapped(self) -> np.ndarray:
        """The bytes as memory, which the system reads when it is looked at, and writes back when it was changed.

        What has been started must be over.
        """
        return np.frombuffer(mmap.mmap(self.descriptor, self.num_bytes), np.uint8)

    def __del__(self) -> None:
        os.close(self.descriptor)


def check_folder(directory: Path) -> None:
    """ValueError for what is no folder of a disk that may be written to."""
    if not directory.is_dir():
        there = "is no folder" if directory.exists() else "is not there"
        raise ValueError(f"{directory}, where states are to be kept, {there}; name a folder of a local disk")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"{directory}, where states are to be kept, may not be written to by this user")


def _file_system(directory: Path) -> str:
    """The type of the file system that a folder lies in, "" where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as file:
        rows = [line.split(" ") for line in file]
        inside = [row for row in rows if directory.resolve().is_relative_to(row[1].replace("\\040", " "))]
        return max(inside, key=lambda row: len(row[1]))[2] if inside else ""
    return ""


def _open_without_name(directory: Path) -> tuple[int, bool]:
    """(a new file that only this process can reach, whether it passes the page cache by)."""
    direct = getattr(os, "O_DIRECT", 0)
    for extra in dict.fromkeys((direct, 0)):
        flags = os.O_RDWR | os.O_CLOEXEC | extra
        try:
            return os.open(directory, flags | os.O_TMPFILE, 0o600), bool(extra)
        except OSError as error:
            if error.errno not in _UNKNOWN_TO_THE_FILE_SYSTEM:
                raise
        descriptor, name = tempfile.mkstemp(dir=directory, prefix="pypar-")  # 0600
        os.close(descriptor)
        try:
            return os.open(name, flags), bool(extra)
        except OSError as error:
            if error.errno not in _UNKNOWN_TO_THE_FILE_SYSTEM or not extra:
                raise
        finally:
            os.unlink(name)
    raise AssertionError("unreachable")


def _reserve(descriptor: int, num_bytes: int, directory: Path) -> None:
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(
            f"{directory} has no room for {num_bytes:,} bytes of states ({shutil.disk_usage(directory).free:,} are "
            f"free: {os.strerror(error.errno)}); name a folder of a larger disk, or use more ranks"
        ) from None


def _queue(kind: str | None) -> tuple[str, Any]:
    native = importlib.import_module("pypar._native")
    if kind != "threads":
        try:
            return "io_uring", native.FileQueue("io_uring", QUEUE_DEPTH)
        except OSError:
            if kind is not None:
                raise
    return "threads", native.FileQueue("threads", NUM_THREADS)


def background_kind() -> str:
    """What this machine reads and writes files in the background by: "io_uring" or "threads"."""
    return _queue(None)[0]
