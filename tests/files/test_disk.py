"""Bytes on a disk: what is written is read, by io_uring and by threads; nothing is left; errors say where."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pypar.files.disk import BLOCK_BYTES, Disk, aligned

MANY = 9 * (1 << 20)  # of several pieces, the last one short


@pytest.fixture(params=["io_uring", "threads"])
def disk(request, tmp_path):
    try:
        return Disk(tmp_path, owner="rank 3", kind=request.param)
    except OSError as error:
        pytest.skip(f"this machine does not allow {request.param}: {error}")


def filled(num_bytes, seed):
    buffer = aligned(num_bytes)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    return buffer


def test_what_is_written_is_read(disk):
    rooms = [disk.room(n) for n in (1, BLOCK_BYTES, MANY)]
    assert [room.num_bytes for room in rooms] == [BLOCK_BYTES, BLOCK_BYTES, MANY]
    written = [filled(room.num_bytes, seed) for seed, room in enumerate(rooms)]
    for started in [room.write_start(0, x) for room, x in zip(rooms, written, strict=True)]:
        started.wait()
        started.wait()  # a second time it is over already
    read = [aligned(room.num_bytes) for room in rooms]
    for started in [room.read_start(0, x) for room, x in zip(rooms, read, strict=True)]:
        started.wait()
    for x, y in zip(written, read, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_part_of_it(disk):
    room, whole, part = disk.room(4 * BLOCK_BYTES), filled(4 * BLOCK_BYTES, 0), filled(BLOCK_BYTES, 1)
    room.write_start(0, whole).wait()
    room.write_start(2 * BLOCK_BYTES, part).wait()
    found = aligned(2 * BLOCK_BYTES)
    room.read_start(BLOCK_BYTES, found).wait()
    np.testing.assert_array_equal(found, np.concatenate([whole[BLOCK_BYTES : 2 * BLOCK_BYTES], part]))


def test_it_begins_as_zeros_and_may_be_mapped(disk):
    room, found = disk.room(MANY), aligned(MANY)
    room.read_start(0, found).wait()
    assert not found.any()
    memory = room.mapped()
    memory[:] = 7
    del memory
    room.read_start(0, found).wait()
    assert (found == 7).all()
    room.write_start(0, filled(MANY, 2)).wait()
    np.testing.assert_array_equal(room.mapped(), filled(MANY, 2))


def test_errors_say_where(disk):
    room = disk.room(2 * BLOCK_BYTES)
    os.ftruncate(room.descriptor, BLOCK_BYTES)
    with pytest.raises(
        OSError, match=r"reading 8,192 bytes at offset 0 of the file of rank 3 in .* after 4,096"
    ):
        room.read_start(0, aligned(2 * BLOCK_BYTES)).wait()
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, room.descriptor)
    os.close(full)
    with pytest.raises(OSError, match=r"writing 8,192 bytes .* No space left on device.* a checkpoint"):
        room.write_start(0, aligned(2 * BLOCK_BYTES)).wait()


def test_folders_that_cannot_be_used(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    for folder, sentence in ((tmp_path / "none", "is not there"), (plain, "is no folder")):
        with pytest.raises(ValueError, match=sentence):
            Disk(folder, owner="rank 0")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_a_folder_in_memory_is_said_to_be_that():
    with pytest.warns(UserWarning, match="lies in memory"):
        disk = Disk(Path("/dev/shm"), owner="rank 0")
    assert "IN MEMORY" in disk.way
    disk.room(1).write_start(0, filled(BLOCK_BYTES, 0)).wait()


def test_too_little_room(disk):
    with pytest.raises(ValueError, match=r"has no room for 35,184,372,088,832 bytes of states \(.* are free"):
        disk.room(1 << 45)


def test_nothing_is_left_when_the_process_is_killed(disk):
    program = (
        "import os, signal, sys; from pathlib import Path; from pypar.files.disk import Disk, aligned\n"
        "room = Disk(Path(sys.argv[1]), owner='it', kind=sys.argv[2]).room(1 << 20)\n"
        "room.write_start(0, aligned(1 << 20)); assert not list(Path(sys.argv[1]).iterdir())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(disk.directory), disk.kind])
    assert ended.returncode == -9 and not list(disk.directory.iterdir())
