"""The ranks' shared areas by CUDA IPC, and the kernels of csrc/allreduce/ over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from pypar.comm.allreduce.ranks import Ranks
from pypar.ops import native

NAME = "cuda"
STAGES = ("the data", "the reduced slices")
_MOST_CHECKED_BYTES = 4096  # of the copy that shows whether peers can read each other


def unsupported(device: torch.device) -> str | None:
    """Why these kernels cannot run on this device, or None."""
    return gpu_refusal(device) or native.cuda_missing()


def gpu_refusal(device: torch.device) -> str | None:
    """Why no kernel of ours runs on this device, or None."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return f"it runs on NVIDIA GPUs, and the device is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def connect(ranks: Ranks, device: torch.device, max_bytes: int, timeout_ms: int) -> CudaPeers:
    """Collective. RuntimeError, the same on every rank, where the peers cannot reach each other's memory."""

    def stream() -> int:
        return torch.cuda.current_stream(device).cuda_stream

    return CudaPeers(native.cuda_module(), ranks, device.index, max_bytes, timeout_ms, stream)


class CudaPeers:
    """The areas of all ranks, mapped here. module: the functions of pypar._cuda. stream: the current one."""

    name = NAME

    def __init__(
        self,
        module: ModuleType,
        ranks: Ranks,
        device_index: int,
        max_bytes: int,
        timeout_ms: int,
        stream: Callable[[], int],
    ) -> None:
        self._module, self._ranks, self._device_index, self._stream = module, ranks, device_index, stream
        self._opened: dict[int, int] = {}
        self._area = self._error = 0
        self._offset = module.allreduce_layout()["data_offset"]
        self._checked_bytes = min(_MOST_CHECKED_BYTES, module.allreduce_area_bytes(max_bytes) - self._offset)
        try:
            handle = ranks.agree("sharing GPU memory", lambda: self._allocate(max_bytes))
            ranks.agree("opening the peers' GPU memory", lambda: self._open(handle))
            ranks.agree("writing a pattern for the peers", lambda: self._write_pattern())
            ranks.agree("reading the peers' patterns", lambda: self._read_patterns())
        except RuntimeError:  # on all ranks
            self.close()
            raise
        self._group = {
            "areas": [self._area if r == ranks.rank else self._opened[r] for r in range(ranks.size)],
            "rank": ranks.rank,
            "error": self._error,
            "max_bytes": max_bytes,
            "timeout_ms": timeout_ms,
            "device": device_index,
        }

    def _allocate(self, max_bytes: int) -> bytes:
        # Flags are zero before any peer learns where they are.
        self._area, self._error = self._module.allreduce_allocate(max_bytes, self._device_index)
        return self._module.peer_handle(self._area, self._device_index)

    def _open(self, handles: list[bytes]) -> None:
        for rank, handle in enumerate(handles):
            if rank != self._ranks.rank:
                self._opened[rank] = self._module.peer_open(handle, self._device_index)

    def _pattern(self, rank: int) -> bytes:
        """What a rank writes at the beginning of its data."""
        return hashlib.shake_128(f"{rank} of {self._ranks.token}".encode()).digest(self._checked_bytes)

    def _write_pattern(self) -> None:
        self._module.peer_write(
            self._area + self._offset, self._pattern(self._ranks.rank), self._device_index
        )

    def _read_patterns(self) -> None:
        """A real copy: CUDA reports peer access between GPUs that then read something else."""
        for rank, area in self._opened.items():
            found = self._module.peer_read(area + self._offset, self._checked_bytes, self._device_index)
            if found != self._pattern(rank):
                raise RuntimeError(
                    f"the memory of rank {rank} does not hold what that rank wrote, though CUDA offers peer access"
                )

    def all_reduce(self, x: Tensor, y: Tensor, two_shot: bool) -> None:
        native.run(
            self._module.allreduce,
            self._group, x, y, x.numel(), native.dtype_code(x), two_shot, 0,
            self._stream(),
        )  # fmt: skip

    def norm_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        """Why the fused kernel does not take these, or None."""
        if weight.dtype != x.dtype:
            return f"weight is {weight.dtype} and x {x.dtype}"
        D, most = x.shape[-1], self._module.allreduce_layout()["max_D"]
        if D * x.element_size() % 16 or not 0 < D <= most:
            return f"a row of {D} is not a multiple of 16 bytes up to {most} elements"
        return None

    def residual_norm(self, tensors: dict[str, Tensor], eps: float, two_shot: bool) -> None:
        x = tensors["x"]
        D = x.shape[-1]
        native.run(
            self._module.allreduce_rms_norm,
            self._group, tensors, x.numel() // D, D, eps, native.dtype_code(x), two_shot, 0,
            self._stream(),
        )  # fmt: skip

    def error(self) -> tuple[int, int, str] | None:
        """(rank waited for, number of the call, what was waited for) of a wait past its time-out."""
        found = self._module.allreduce_error(self._error)
        return None if found is None else (found[0], found[1], STAGES[found[2]])

    def close(self) -> None:
        """Collective unless a wait has failed, when the own area stays: a peer may still be reading it."""
        lost = bool(self._error) and self.error() is not None
        for address in self._opened.values():
            self._module.peer_close(address, self._device_index)
        self._opened = {}
        if lost:
            return
        self._ranks.gather(None)  # nobody frees what somebody has still mapped
        if self._area:
            self._module.allreduce_free(self._area, self._error, self._device_index)
        self._area = self._error = 0
