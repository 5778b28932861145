"""Optimizer states on a disk (ZeRO-Infinity, arXiv 2104.07857): in memory for the moment of their own update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pypar.files.disk import Disk, Room, Started, aligned
from pypar.ops.uncompiled import uncompiled

CACHE_LINE_BYTES = 64
NUM_BUFFERS = 3  # one is read, one is computed with, one is written
BYTES_OF_STATES = (
    8  # a number of a parameter, as AdamW has them: by this parts are filled before states are there
)
_OF_GRAD_SCALER = ("grad_scale", "found_inf")

Groups = list[dict[str, Any]]


class OnDisk(torch.optim.Optimizer):
    """An optimizer of torch's interface, whose states lie on a disk between updates.

        optimizer = pypar.OnDisk(functools.partial(torch.optim.AdamW, lr=1e-3), model.parameters(), "/scratch")
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    Parameters are updated in parts, one after the other: while one is computed, the states of the next are read and
    those of the one before are written. The results are those of the optimizer itself, bit for bit, where it treats
    each parameter by itself. Learning rates and other options are those of ``param_groups``, as ever. state_dict() and
    load_state_dict() are those of the optimizer.

    make        makes the optimizer of some groups of parameters; it is called once for each part
    params      parameters, or groups of them
    directory   a folder of a local disk; the files in it have no names and end with the process
    part_bytes  of states that are in memory at once, three times; a parameter with more is a part of its own
    owner       who this is for, as errors of the disk say it

    ValueError: a folder that cannot be used, states that do not lie in CPU memory, too little room on the disk.
    OSError: what the disk did not do, with the place; states are lost then, and a checkpoint is to be gone on from.
    """

    def __init__(
        self,
        make: Callable[[Groups], torch.optim.Optimizer],
        params: Iterable[Any],
        directory: str | Path,
        *,
        part_bytes: int = 64 << 20,
        owner: str = "this process",
    ) -> None:
        if part_bytes < 1:
            raise ValueError(f"part_bytes ({part_bytes}) must be positive; 64 << 20 is 64 MiB")
        self._make, self._part_bytes = make, part_bytes
        self.disk = Disk(Path(directory), owner=owner)
        self._parts: list[_Part] = []
        self._buffers = [aligned(0) for _ in range(NUM_BUFFERS)]
        self._writes: list[Started | None] = [None] * NUM_BUFFERS
        whole = make(list(params))
        super().__init__(whole.param_groups, whole.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; its parameters become parts of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for params in _in_parts(group["params"], self._part_bytes):
            optimizer = self._make([{**group, "params": params}])
            optimizer.state = self.state
            self._parts.append(_Part(optimizer, params, group))
        self._step_supports_amp_scaling = getattr(optimizer, "_step_supports_amp_scaling", False)

    @property
    def buffer_bytes(self) -> int:
        """What the buffers hold in memory."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def disk_bytes(self) -> int:
        """What states take on the disk; each update reads and writes as much."""
        return sum(part.room.num_bytes for part in self._parts if part.room is not None)

    @property
    def way(self) -> str:
        """Where states are and how they travel, in words."""
        return f"{self.disk_bytes:,} bytes in {self.disk.way}, {self.buffer_bytes:,} bytes of buffers"

    @uncompiled("it reads and writes files")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reads: dict[int, Started] = {}
        self._read(0, reads)
        for index, part in enumerate(self._parts):
            self._read(index + 1, reads)
            if index in reads:
                reads.pop(index).wait()
                part.place(self._buffer(index, part))
            self._update(part)
            if part.has_other_states():
                part.put_away(self.disk)
            elif part.room is not None:
                buffer = self._buffer(index, part)
                part.collect(buffer)
                self._writes[index % NUM_BUFFERS] = part.room.write_start(0, buffer)
            part.empty()
        return loss

    def _update(self, part: _Part) -> None:
        (group,) = part.optimizer.param_groups
        group.update({name: value for name, value in part.group.items() if name != "params"})
        given = {name: vars(self)[name] for name in _OF_GRAD_SCALER if name in vars(self)}
        vars(part.optimizer).update(given)
        try:
            part.optimizer.step()
        finally:
            for name in given:
                del vars(part.optimizer)[name]

    def start(self, states: Callable[[Tensor], dict[str, Any]]) -> None:
        """Begin with these states of each parameter, of which only a part is in memory at once."""
        for part in self._parts:
            self.state.update({param: states(param) for param in part.params})
            part.put_away(self.disk)
            part.empty()

    def put_away(self) -> None:
        """Move states that are in memory, as an optimizer's first ones may be, to the disk."""
        self._finish()
        for part in self._parts:
            if part.has_other_states():
                part.put_away(self.disk)
                part.empty()

    def bring_back(self) -> None:
        """Let all states be memory that stands for the disk, until the next update: to be read, or overwritten."""
        self._finish()
        for part in self._parts:
            if part.room is not None:
                part.place(part.room.mapped())

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's own, with tensors of its own: whole, in memory."""
        self.bring_back()
        found = super().state_dict()
        found["state"] = {
            key: {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}
            for key, state in found["state"].items()
        }
        self._empty()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's own."""
        self._finish()
        params = [p for group in self.param_groups for p in group["params"]]
        whole = self._make([{**group, "params": list(group["params"])} for group in self.param_groups])
        whole.load_state_dict(state_dict)  # an optimizer may convert what it loads
        for group, loaded in zip(self.param_groups, whole.param_groups, strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
        for part in self._parts:
            part.forget()
        self.state.clear()
        self.state.update({p: whole.state[p] for p in params if p in whole.state})
        self.put_away()

    def _read(self, index: int, reads: dict[int, Started]) -> None:
        """Start to read a part's states into its buffer, once what is written from there is written."""
        if index < len(self._parts):
            slot, part = index % NUM_BUFFERS, self._parts[index]
            self._finish(slot)
            if part.room is not None:
                if self._buffers[slot].nbytes < part.room.num_bytes:
                    self._buffers[slot] = aligned(part.room.num_bytes)
                reads[index] = part.room.read_start(0, self._buffer(index, part))

    def _buffer(self, index: int, part: _Part) -> np.ndarray:
        assert part.room is not None
        return self._buffers[index % NUM_BUFFERS][: part.room.num_bytes]

    def _finish(self, *which: int) -> None:
        for index in which or range(NUM_BUFFERS):
            started, self._writes[index] = self._writes[index], None
            if started is not None:
                started.wait()

    def _empty(self) -> None:
        for part in self._parts:
            part.empty()


class _Part:
    """Parameters that are updated together, and where each of their states lies."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[Tensor], group: dict[str, Any]) -> None:
        self.optimizer, self.params, self.group = optimizer, params, group
        self.room: Room | None = None
        self.places: dict[tuple[int, str], tuple[int, torch.Size, torch.dtype]] = {}
        self.placed: dict[tuple[int, str], Tensor] = {}  # states in a buffer, while they are there

    def states(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """Every state but counters, which stay in memory."""
        for index, param in enumerate(self.params):
            for name, x in self.optimizer.state.get(param, {}).items():
                if isinstance(x, Tensor) and x.dim():
                    yield (index, name), x

    def has_other_states(self) -> bool:
        """Whether states are there that have no place on the disk, as after a parameter's first gradient."""
        return any(key not in self.places for key, _ in self.states())

    def put_away(self, disk: Disk) -> None:
        """Give states, which are all in memory, new places on the disk."""
        self.places, self.placed, end = {}, {}, 0
        for key, x in self.states():
            if x.device.type != "cpu":
                raise ValueError(
                    f"a state {key[1]} lies on {x.device}; states on a disk are updated in CPU memory: keep the "
                    "optimizer's parameters there"
                )
            end = -(-end // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
            self.places[key] = end, x.shape, x.dtype
            end += x.nbytes
        self.room = disk.room(max(end, 1))
        memory = aligned(self.room.num_bytes)
        self.collect(memory)
        self.room.write_start(0, memory).wait()

    def place(self, memory: np.ndarray) -> None:
        """Let states be what lies in this memory."""
        self.placed = {key: self._within(memory, key) for key, _ in self.states()}
        for key, x in self.states():
            x.set_(self.placed[key])  # type: ignore[call-overload]

    def collect(self, memory: np.ndarray) -> None:
        """Copy states there that are not there already."""
        for key, x in self.states():
            if key not in self.placed or not x.is_set_to(self.placed[key]):
                self._within(memory, key).copy_(x)

    def empty(self) -> None:
        """Let states take no memory."""
        self.placed = {}
        for _, x in self.states():
            x.set_(torch.empty(0, dtype=x.dtype))  # type: ignore[call-overload]

    def forget(self) -> None:
        self.room, self.places = None, {}

    def _within(self, memory: np.ndarray, key: tuple[int, str]) -> Tensor:
        begin, shape, dtype = self.places[key]
        end = begin + math.prod(shape) * dtype.itemsize
        return torch.from_numpy(memory[begin:end]).view(dtype).view(shape)


def _in_parts(params: Iterable[Tensor], part_bytes: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    num_bytes = 0
    for param in params:
        size = param.numel() * BYTES_OF_STATES
        if part and num_bytes + size > part_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(param)
        num_bytes += size
    if part:
        yield part
