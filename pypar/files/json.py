"""Reading JSON that somebody else may have written: bounded in size, and every fault is a `ValueError`."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

FEW_CONTAINERS = 100_000
BYTES_OF_A_CONTAINER = 12  # of text, at least: "[]," takes 60 bytes of memory for 3 of text
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def open_plain(path: Path, *, follow_symlink: bool = True) -> BinaryIO:
    """The file at ``path``, unbuffered; ValueError where it is not a plain file, or a link that is not wanted.

    Opening never waits, as that of a named pipe would.
    """
    flags = os.O_RDONLY | _NO_WAITING | (0 if follow_symlink else getattr(os, "O_NOFOLLOW", 0))
    if not follow_symlink and path.is_symlink():
        raise ValueError("it is a symbolic link")
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a plain file")
    return os.fdopen(handle, "rb", buffering=0)


def parse_json(data: bytes) -> Any:
    """The value of ``data``; ValueError with half a sentence where it is not JSON, as NaN and Infinity are not.

    Nor is a text read that is little but brackets: it would take twenty times its size.
    """
    containers = data.count(b"[") + data.count(b"{")
    if containers > max(FEW_CONTAINERS, len(data) // BYTES_OF_A_CONTAINER):
        raise ValueError(f"it holds {containers:,} lists and tables in {len(data):,} bytes")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # also of text that is not UTF-8, and of numbers with thousands of digits
        raise ValueError(f"it is not JSON: {error}") from None


def read_json(path: Path, most_bytes: int, *, follow_symlink: bool = True) -> Any:
    """The value of a JSON file of at most ``most_bytes``.

    ValueError with half a sentence where it is larger, not JSON or not a plain file; OSError as `open` raises it.
    """
    with open_plain(path, follow_symlink=follow_symlink) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"it has {size:,} bytes, more than the {most_bytes:,} that are read")
        return parse_json(read_exactly(file, 0, size))


def read_exactly(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    """``num_bytes`` from ``position``; ValueError where the file ends before."""
    data = bytearray(num_bytes)
    read_into(file, position, memoryview(data))
    return bytes(data)


def read_into(file: BinaryIO, position: int, out: memoryview) -> None:
    """Fill ``out`` (bytes) from ``position`` on; ValueError where the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(file.fileno(), [out[done : done + (1 << 30)]], position + done)
        if count == 0:
            raise ValueError(f"it ends after {position + done:,} bytes")
        done += count


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
