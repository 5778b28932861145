"""One chunk: memory on the host for good, and on the device while it is used there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pypar.arenas import Arena, Copies, Copy
from pypar.data_parallel.chunks.table import State, changed


class Chunk:
    """Elements of one dtype that move together.

    The memory of the device is one storage for good, of size 0 while it is away, so that what holds views of it sees
    the same elements each time.

    home   the elements on the host; on the device where the chunk is a resident
    there  the elements on the device
    """

    def __init__(
        self, name: str, numel: int, dtype: torch.dtype, device: Arena, host: Arena, copies: Copies
    ) -> None:
        self.name, self.num_bytes = name, numel * dtype.itemsize
        self._device, self._host, self._copies = device, host, copies
        self.home = host.empty((numel,), dtype).zero_()
        self.there = device.empty((numel,), dtype)
        device.free(self.there)
        self.state = State.ABSENT
        self.is_resident = False
        self.num_users = 0
        self._is_written = False  # by its users
        self._copy: Copy | None = None

    def _become(self, state: State) -> None:
        self.state = changed(self.name, self.state, state)

    @property
    def is_here(self) -> bool:
        return self.is_resident or self.state is not State.ABSENT

    def fetch(self) -> None:
        """Take memory of the device and begin to copy the chunk there."""
        self._become(State.COMING)
        try:
            self._device.bring(self.there)
        except BaseException:
            self.state = State.ABSENT
            raise
        self._copy = self._copies.to_device_start(self.there, self.home)

    def make(self) -> None:
        """Take memory of the device without values, for a use that creates them."""
        self._device.bring(self.there)
        self._become(State.USED)
        self._become(State.HELD)

    def _settle(self) -> None:
        """Wait for the copy that is under way."""
        if self._copy is not None:
            copy, self._copy = self._copy, None
            copy.wait()
        if self.state in (State.COMING, State.GOING):
            self._become(State.HELD)

    def use(self, *, writes: bool) -> None:
        """The device is about to read it, or to write it too."""
        if not self.is_resident:
            self._settle()
            if self.state is not State.USED:
                self._become(State.USED)
            self._is_written |= writes
        self.num_users += 1

    def release(self) -> None:
        """One of its users is done."""
        self.num_users -= 1
        if not self.num_users and not self.is_resident:
            self._become(State.WRITTEN if self._is_written else State.HELD)

    def flush(self) -> None:
        """Begin to copy to the host what was written."""
        self._settle()
        if self.state is State.WRITTEN:
            self._become(State.GOING)
            self._is_written = False
            self._copy = self._copies.to_host_start(self.home, self.there)

    def drop(self) -> None:
        """Give the memory of the device back, of what the host has too."""
        self._settle()
        self._become(State.ABSENT)
        self._device.free(self.there)

    def forget(self) -> None:
        """Give the memory of the device back, whatever it holds: a pass has failed, or other values came."""
        if not self.is_resident and self.state is not State.ABSENT:
            copy, self._copy = self._copy, None
            if copy is not None:
                copy.wait()
            self._device.free(self.there)
            self.state = State.ABSENT
            self._is_written = False
        self.num_users = 0

    def settle_down(self) -> None:
        """Become a resident: home is the device from now on."""
        assert self.state is State.ABSENT, f"{self.name} is {self.state.value}"
        self._device.bring(self.there)
        self.there.copy_(self.home)
        self._host.free(self.home)
        self.home = self.there
        self.is_resident = True

    def move_out(self) -> None:
        """Be no resident any more; who uses it goes on."""
        self.home = self._host.empty(self.there.shape, self.there.dtype)
        self.home.copy_(self.there)
        self.is_resident = False
        self.state = State.USED if self.num_users else State.HELD
        self._is_written = self.num_users > 0
        if not self.num_users:
            self.drop()


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes, one after the other in memory."""
    made, begin = [], 0
    for each in like:
        made.append(flat[begin : begin + each.numel()].view(each.shape))
        begin += each.numel()
    return made
