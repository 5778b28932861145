"""AdamW whose states lie on a disk, beside states in memory and beside the disk alone, after a check of the results.

    python bench/on_disk.py [--directory .] [--parameters 64] [--part 64] [--rounds 5]

--parameters are millions, in matrices of 4 million; 8 bytes of states each are read and written by an update. "disk
alone" reads and writes the same bytes in the same parts and order, and computes nothing: the least that an update
whose limit is the disk can take. The share is its time by that of the update; where it is far below 1, the update
waits for the processor or for memory. "in memory" has all states there.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import torch

import pypar
from pypar.bench import timing
from pypar.files.disk import Disk, Started, aligned
from pypar.optimizers.on_disk import BYTES_OF_STATES, NUM_BUFFERS

MATRIX = (2048, 2048)
MAKE = functools.partial(pypar.AdamW, lr=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path())
    parser.add_argument("--parameters", type=int, default=64, help="millions")
    parser.add_argument("--part", type=int, default=64, help="MiB of states that are in memory at once")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    check(arguments.directory)
    count = max(1, arguments.parameters * 1_000_000 // (MATRIX[0] * MATRIX[1]))
    in_memory, on_disk = ([torch.nn.Parameter(torch.randn(MATRIX)) for _ in range(count)] for _ in range(2))
    for p in (*in_memory, *on_disk):
        p.grad = torch.randn(MATRIX)
    plain = MAKE(in_memory)
    ours = pypar.OnDisk(MAKE, on_disk, arguments.directory, part_bytes=arguments.part << 20)
    ours.step()
    alone = Alone(Disk(arguments.directory, owner="the bench"), ours.disk_bytes, arguments.part << 20)
    contenders = {"in memory": plain.step, "on disk": ours.step, "disk alone": alone.step}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds + 1):  # the first round warms up
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if name != "in memory":
                (ours.put_away if name == "on disk" else alone.finish)()  # until all is written
            seconds[name].append(time.perf_counter() - start)
    found = {name: sorted(each[1:])[arguments.rounds // 2] for name, each in seconds.items()}
    moved = 2 * ours.disk_bytes
    copy = timing.copy_rate(rounds=3)
    print(f"{ours.way}; a copy in memory: {copy / 1e9:.1f} GB/s")
    print(
        f"{count * MATRIX[0] * MATRIX[1] / 1e6:.0f} M parameters: on disk {found['on disk']:.2f} s, "
        f"{moved / found['on disk'] / 1e9:.2f} GB/s read and written, {found['disk alone'] / found['on disk']:.0%} of "
        f"the disk alone ({moved / found['disk alone'] / 1e9:.2f} GB/s); in memory {found['in memory']:.2f} s; states "
        f"in memory {ours.buffer_bytes / 2**20:.0f} of {ours.disk_bytes / 2**20:.0f} MiB"
    )


class Alone:
    """The reads and writes of an update, in its parts and order."""

    def __init__(self, disk: Disk, num_bytes: int, part_bytes: int) -> None:
        self.room, self.part_bytes = disk.room(num_bytes), part_bytes
        self.buffers = [aligned(part_bytes) for _ in range(NUM_BUFFERS)]
        self.writes: list[Started | None] = [None] * NUM_BUFFERS
        self.offsets = range(0, self.room.num_bytes - part_bytes + 1, part_bytes)

    def step(self) -> None:
        reads = [self._read(0)]
        for index, offset in enumerate(self.offsets):
            if index + 1 < len(self.offsets):
                reads.append(self._read(index + 1))
            reads[index].wait()
            slot = index % NUM_BUFFERS
            self.writes[slot] = self.room.write_start(offset, self.buffers[slot])

    def finish(self) -> None:
        for slot in range(NUM_BUFFERS):
            self._written(slot)

    def _read(self, index: int) -> Started:
        slot = index % NUM_BUFFERS
        self._written(slot)
        return self.room.read_start(self.offsets[index], self.buffers[slot])

    def _written(self, slot: int) -> None:
        started, self.writes[slot] = self.writes[slot], None
        if started is not None:
            started.wait()


def check(directory: Path) -> None:
    """The same bits as in memory, over a few updates."""
    weights = [torch.nn.Parameter(torch.ones(100, 1023)) for _ in range(2)]
    optimizers = [MAKE(weights[:1]), pypar.OnDisk(MAKE, weights[1:], directory)]
    for step in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(*weights) and BYTES_OF_STATES == 8


if __name__ == "__main__":
    main()
