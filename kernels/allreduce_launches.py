"""All-reduce's kernels with their arguments, and the buffers that they share."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .allreduce import FOREVER, _one_shot_kernel, _residual_norm_kernel, _two_shot_kernel
from .launch import Launch

# Chosen for few blocks and 16 bytes a thread; no timing on a device went into these.
NUM_BLOCKS = 32
NUM_WARPS = 8
TILE_BYTES = 16 * 32 * NUM_WARPS
MAX_REGISTERS = 128  # left alone, the compiler spills to fit more blocks on a multiprocessor than there are
LARGEST_ROW_BYTES = 16384  # of the fused form, where a block holds a row; longer ones spill
STAGES = ("the data", "the reduced slices")
INTERPRETED = not isinstance(_one_shot_kernel, triton.JITFunction)


class Workspace(NamedTuple):
    """One rank's view of the buffers.

    addresses: int64 [P], where each rank's buffer is mapped here. error: int64 [1] that the device can write: 0, or
    what `describe` reads. limit: nanoseconds of one wait. memory: what keeps the buffers.
    """

    addresses: Tensor
    error: Tensor
    rank: int
    slot_bytes: int
    limit: int = FOREVER.value
    memory: Any = None

    @property
    def ranks(self) -> int:
        return self.addresses.numel()


def header_bytes(ranks: int) -> int:
    """Flags of 2 sets and 2 stages, one a rank and block; then a counter and a clock of 8 bytes for each block."""
    return triton.cdiv(16 * NUM_BLOCKS * ranks + 16 * NUM_BLOCKS, 256) * 256


def slot_bytes(max_bytes: int, ranks: int) -> int:
    """Tensors of max_bytes, cut into one slice of whole tiles per rank."""
    return triton.cdiv(max_bytes, ranks * TILE_BYTES) * ranks * TILE_BYTES


def buffer_bytes(max_bytes: int, ranks: int) -> int:
    return header_bytes(ranks) + 2 * slot_bytes(max_bytes, ranks)


def symmetric_workspace(group: Any, device: torch.device, max_bytes: int, limit: int) -> Workspace:
    """Collective: torch's symmetric memory among the group's ranks. RuntimeError where torch cannot share it."""
    import torch.distributed._symmetric_memory as symmetric_memory

    ranks = group.size()
    size = buffer_bytes(max_bytes, ranks)
    memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # flags are zero before any rank learns where they are
    handle = symmetric_memory.rendezvous(memory, group)
    buffers = [handle.get_buffer(peer, (size,), torch.uint8) for peer in range(ranks)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64, device=device)
    error = torch.zeros(
        1, dtype=torch.int64, pin_memory=True
    )  # the host looks at it without waiting for the device
    kept = (memory, handle, buffers)
    return Workspace(addresses, error, group.rank(), slot_bytes(max_bytes, ranks), limit, kept)


def describe(error: int) -> tuple[int, int, str] | None:
    """(rank waited for, number of the call, what was waited for) of an error word; None for 0."""
    if error == 0:
        return None
    return (error & 255) - 1, (error >> 16) & 0xFFFFFFFF, STAGES[(error >> 8) & 255]


def all_reduce_launch(workspace: Workspace, x: Tensor, y: Tensor, two_shot: bool) -> Launch:
    """y = the sum of the ranks' x, contiguous tensors of one dtype and size; y may be x."""
    arguments = {**_shared(workspace), "x_ptr": x, "y_ptr": y, "numel": x.numel()}
    arguments["TILE"] = TILE_BYTES // x.element_size()
    kernel = _two_shot_kernel if two_shot else _one_shot_kernel
    return Launch(kernel, NUM_BLOCKS, arguments, NUM_WARPS, 1, MAX_REGISTERS)


def residual_norm_launch(
    workspace: Workspace,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual_out: Tensor,
) -> Launch:
    """residual_out = the sum of the ranks' x + residual, out = its RMS norm; contiguous [..., D], rows of up to
    LARGEST_ROW_BYTES."""
    D = x.shape[-1]
    arguments = {
        **_shared(workspace),
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "out_ptr": out,
        "residual_out_ptr": residual_out,
        "rows": x.numel() // max(D, 1),
        "eps": eps,
        "D": D,
        "BLOCK_D": triton.next_power_of_2(max(D, 1)),
    }
    num_warps = NUM_WARPS if D <= 4096 else 2 * NUM_WARPS
    return Launch(_residual_norm_kernel, NUM_BLOCKS, arguments, num_warps, 1, MAX_REGISTERS)


def _shared(workspace: Workspace) -> dict[str, Any]:
    return {
        "buffers_ptr": workspace.addresses,
        "error_ptr": workspace.error,
        "rank": workspace.rank,
        "header_bytes": header_bytes(workspace.ranks),
        "slot_bytes": workspace.slot_bytes,
        "limit": workspace.limit,
        "RANKS": workspace.ranks,
        "BLOCKS": NUM_BLOCKS,
        "CLOCK": not INTERPRETED,
    }
