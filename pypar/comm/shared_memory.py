"""The ranks of one host open a piece of memory together.

The first of them makes a memory file without a name and hands it to the others over a socket in the abstract namespace:
nothing is ever written to a folder, so nothing can be left there, whoever dies when. The socket's name is random,
and both ends check that the other process belongs to the same user.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pypar.comm.operands import part
from pypar.ops import native

# A data buffer holds one step of a collective: small enough to stay in the caches of two cores, large enough that
# waiting for each other costs little.
BUFFER_BYTES = 1 << 20
# Where ranks outnumber cores a step costs changes of process, and larger ones fewer of them: an all_reduce of 32 MiB on
# 4 ranks and 2 cores takes 55 ms with 1 MiB, 43 ms with 4 MiB.
CROWDED_BUFFER_BYTES = 1 << 22
# What a sender may be ahead of its receiver.
STREAM_BYTES = 1 << 18
_MOST_STREAM_BYTES = 1 << 28  # of all pairs together; a page is committed when it is first used

# (bytes of a part, number of the call, the first rank's socket)
_OFFER = "<qq48s"
_BYTES = 10  # ShmType: bytes that are only moved
# Ranks that have just exchanged messages have no reason to stay away longer.
_HAND_OVER = timedelta(seconds=60)

HOST_VARIABLE = "PYPAR_HOST"


def host_identity() -> str:
    """Equal for processes that can share memory. The environment variable PYPAR_HOST overrides it."""
    if name := os.environ.get(HOST_VARIABLE):
        return name
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}:{os.stat('/proc/self/ns/net').st_ino}:{os.getuid()}"


def open_group(store: dist.Store, ranks: list[int], rank: int, timeout: timedelta, name: str) -> Any:
    """A native group of `ranks`, which are on this host and `rank` one of them; all of them call this.

    RuntimeError where memory cannot be shared; the store's or socket's time-out where a rank does not come.
    """
    index = ranks.index(rank)
    make = native.module().ShmGroup
    key = f"shared_memory/{ranks[0]}"
    if index:
        address, buffer_bytes, stream_bytes = store.get(key).decode().split()
        sizes = len(ranks), int(buffer_bytes), int(stream_bytes)
        fd = _receive_file(address, timeout)
    else:
        sizes = len(ranks), *_choose_sizes(len(ranks))
        fd = os.memfd_create("pypar", os.MFD_CLOEXEC)
        os.ftruncate(fd, make.segment_bytes(*sizes))
        if len(ranks) > 1:
            with _listener(len(ranks) - 1, timeout) as (listener, address):
                store.set(key, f"{address} {sizes[1]} {sizes[2]}")
                _hand_out(fd, listener, len(ranks) - 1)
    try:
        group = make(fd, index, *sizes, name)  # from here on the descriptor is the group's
    except BaseException:
        os.close(fd)
        raise
    group.set_timeout(timeout.total_seconds())
    return group


def _choose_sizes(num_ranks: int) -> tuple[int, int]:
    """(bytes of a data buffer, bytes of a stream)"""
    stream_bytes = STREAM_BYTES
    while num_ranks**2 * stream_bytes > _MOST_STREAM_BYTES and stream_bytes > 4096:
        stream_bytes //= 2
    return (CROWDED_BUFFER_BYTES if num_ranks > (os.cpu_count() or 1) else BUFFER_BYTES), stream_bytes


def map_together(native: Any, rank: int, size: int, part_bytes: int, number: int, timeout: timedelta) -> Any:
    """Memory of `part_bytes` for each rank of a native group, which all its ranks map at one time; zeros.

    What comes back shows this rank's part by the buffer protocol, and is unmapped with it. `number` counts the group's
    calls. RuntimeError on all ranks where they ask for different sizes, or the first one cannot make the memory.
    """
    timeout = min(timeout, _HAND_OVER)
    fd, problem = -1, ""
    with contextlib.ExitStack() as stack:
        address = ""
        if rank == 0:
            try:
                fd = os.memfd_create("pypar", os.MFD_CLOEXEC)
                stack.callback(os.close, fd)
                os.ftruncate(fd, part_bytes * size)
                listener, address = stack.enter_context(_listener(size - 1, timeout))
            except OSError as error:
                problem = str(error)
        offers = _exchange(native, size, struct.pack(_OFFER, part_bytes, number, address.encode()))
        first_bytes, _, first_address = offers[0]
        for other, (its_bytes, its_number, _) in enumerate(offers):
            if (its_bytes, its_number) != offers[0][:2]:
                raise RuntimeError(
                    f"rank {other} asks for {its_bytes} bytes of shared memory (the group's call {its_number}), rank 0 "
                    f"for {first_bytes} (call {offers[0][1]}); all ranks must make the same calls in the same order"
                )
        if not first_address:
            raise RuntimeError(
                f"the first rank could not make {part_bytes * size} bytes of shared memory{problem and ': ' + problem}"
            )
        if rank == 0:
            _hand_out(fd, listener, size - 1)
        else:
            fd = _receive_file(first_address.decode(), timeout)
            stack.callback(os.close, fd)
        return native.map(fd, part_bytes, number)


def _exchange(native: Any, size: int, offer: bytes) -> list[tuple[int, int, bytes]]:
    mine = torch.frombuffer(bytearray(offer), dtype=torch.uint8)
    all_ranks = torch.empty(size, len(offer), dtype=torch.uint8)
    parts = [part(row) for row in all_ranks]
    native.all_gather(part(mine), parts, _BYTES, False)
    offers = [struct.unpack(_OFFER, bytes(row.tolist())) for row in all_ranks]
    return [(num_bytes, number, address.rstrip(b"\0")) for num_bytes, number, address in offers]


@contextlib.contextmanager
def _listener(num_receivers: int, timeout: timedelta) -> Iterator[tuple[socket.socket, str]]:
    """(a socket that listens, its name)."""
    address = "pypar-" + secrets.token_hex(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + address)
        listener.listen(num_receivers)
        listener.settimeout(timeout.total_seconds())
        yield listener, address


def _hand_out(fd: int, listener: socket.socket, num_receivers: int) -> None:
    while num_receivers:
        connection, _ = listener.accept()
        with connection:
            if _peer_uid(connection) == os.getuid():
                socket.send_fds(connection, [b"pypar"], [fd])
                num_receivers -= 1


def _receive_file(address: str, timeout: timedelta) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout.total_seconds())
        connection.connect("\0" + address)
        if _peer_uid(connection) != os.getuid():
            raise RuntimeError(
                "the process that offers shared memory belongs to another user; start all ranks as one user"
            )
        message, fds, *_ = socket.recv_fds(connection, 16, 1)
    if message != b"pypar" or len(fds) != 1:
        raise RuntimeError(
            "the first rank of this host ended while it handed out the shared memory; see its error"
        )
    os.set_inheritable(fds[0], False)
    return fds[0]


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
