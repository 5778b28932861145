"""all-reduce's Triton kernels, compiled to PTX and run in ptxrun on the CPU, one rank at a time: the other ranks' flags
and data are there already, as they may be."""

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

if not os.environ.get("PYPAR_PTXRUN"):
    pytest.skip("PYPAR_PTXRUN does not name the folder that holds ptxrun", allow_module_level=True)
sys.path.insert(0, os.environ["PYPAR_PTXRUN"])

import ptxrun
from ptxrun.triton_aot import TritonKernel

from pypar.bench.gpu.triton_code import source_of
from pypar.comm.allreduce.peers import residual_norm_reference
from pypar.kernels import allreduce_launches as allreduce
from pypar.kernels.allreduce_launches import NUM_BLOCKS, TILE_BYTES, Workspace
from tests.gpu.allreduce.definition import drawn, total

BLOCK_WORDS = 4 * NUM_BLOCKS  # sets, stages, blocks


class ModuleOfRanks(ptxrun.Module):
    """Maps the ranks' buffers, and writes where into `addresses`."""

    buffers: tuple[Tensor, ...]
    addresses: Tensor

    def _pack(self, kernel, arguments, memory, image):
        for rank, buffer in enumerate(self.buffers):
            span = memory.add_span(f"rank {rank}", buffer.data_ptr(), buffer.nbytes, 0, keep=buffer)
            self.addresses[rank] = span.base
        return super()._pack(kernel, arguments, memory, image)


class Ranks:
    """The ranks' buffers before call number `call`."""

    def __init__(self, ranks: int, max_bytes: int, call: int = 1, limit: int = 100) -> None:
        self.ranks, self.call, self.limit = ranks, call, limit
        self.header = allreduce.header_bytes(ranks)
        self.slot_bytes = allreduce.slot_bytes(max_bytes, ranks)
        size = allreduce.buffer_bytes(max_bytes, ranks)
        self.buffers = tuple(torch.zeros(size, dtype=torch.uint8) for _ in range(ranks))
        self.error = torch.zeros(1, dtype=torch.int64)
        for rank in range(ranks):
            words = self.buffers[rank].view(torch.int32)
            words[BLOCK_WORDS * ranks : BLOCK_WORDS * ranks + NUM_BLOCKS] = _signed(call - 1)

    def flags(self, rank: int) -> Tensor:
        """[sets, stages, blocks, writers] of a rank's buffer."""
        words = self.buffers[rank].view(torch.int32)[: BLOCK_WORDS * self.ranks]
        return words.view(2, 2, NUM_BLOCKS, self.ranks)

    def slot(self, rank: int, dtype: torch.dtype) -> Tensor:
        start = self.header + (self.call & 1) * self.slot_bytes
        return self.buffers[rank][start : start + self.slot_bytes].view(dtype)

    def others_are_there(self, rank: int) -> None:
        for other in set(range(self.ranks)) - {rank}:
            self.flags(rank)[self.call & 1, :, :, other] = _signed(self.call)

    def run(self, rank: int, capability: int, make: Any, *tensors: Any) -> int:
        addresses = torch.zeros(self.ranks, dtype=torch.int64)
        workspace = Workspace(addresses, self.error, rank, self.slot_bytes, self.limit)
        launch = make(workspace, *tensors)
        kernel = TritonKernel(source_of(launch), capability, **launch.options)
        kernel.module = ModuleOfRanks(kernel.ptx)
        kernel.module.buffers, kernel.module.addresses = self.buffers, addresses
        arguments = {name: launch.arguments[name] for name in kernel.arg_names}
        return kernel.launch(launch.num_programs, arguments, race="raise").instructions

    def check_own_flags(self, rank: int, stages: int, blocks: int) -> None:
        """The blocks that had something to do told every rank, in this call's set and in no other word."""
        expected = torch.zeros(2, 2, NUM_BLOCKS, dtype=torch.int32)
        expected[self.call & 1, :stages, :blocks] = _signed(self.call)
        for other in range(self.ranks):
            assert torch.equal(self.flags(other)[..., rank], expected)


def _signed(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    ("two_shot", "ranks", "numel", "dtype", "capability", "call"),
    [
        (False, 2, 5000, torch.bfloat16, 80, 1),
        (False, 3, 4099, torch.float32, 90, 2**31),
        (True, 2, 9001, torch.bfloat16, 90, 2**32),
        (True, 4, 3000, torch.float16, 80, 2),
    ],
)
def test_sums(two_shot, ranks, numel, dtype, capability, call):
    parts = drawn(ranks, (numel,), dtype)
    expected = total(parts).to(dtype)
    tile = TILE_BYTES // dtype.itemsize
    slice_tiles = -(-numel // (tile * ranks)) if two_shot else -(-numel // tile)
    slice_numel = slice_tiles * tile
    for rank in {0, ranks - 1}:
        state = Ranks(ranks, numel * dtype.itemsize, call)
        state.others_are_there(rank)
        for other in set(range(ranks)) - {rank}:
            slot = state.slot(other, dtype)
            slot[:numel] = parts[other]
            if two_shot:  # they have also reduced their slices
                part = slice(other * slice_numel, min((other + 1) * slice_numel, numel))
                slot[part] = expected[part]
        y = torch.full_like(parts[rank], float("nan"))
        state.run(rank, capability, allreduce.all_reduce_launch, parts[rank], y, two_shot)
        assert torch.equal(y, expected)
        assert state.error.item() == 0
        state.check_own_flags(rank, 2 if two_shot else 1, slice_tiles)
        kept = parts[rank].clone()
        if two_shot:
            part = slice(rank * slice_numel, min((rank + 1) * slice_numel, numel))
            kept[part] = expected[part]
        assert torch.equal(state.slot(rank, dtype)[:numel], kept)


@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, 90), (torch.float32, 80)])
def test_residual_norm(dtype, capability):
    ranks, rows, D = 3, 5, 200
    parts = drawn(ranks, (rows, D), dtype)
    residual, weight = drawn(2, (rows, D), dtype, 1)
    weight = weight[0].clone()
    state = Ranks(ranks, parts[0].nbytes)
    state.others_are_there(1)
    for other in (0, 2):
        state.slot(other, dtype)[: rows * D] = parts[other].view(-1)
    out, kept = torch.empty_like(residual), torch.empty_like(residual)
    state.run(1, capability, allreduce.residual_norm_launch, parts[1], residual, weight, 1e-5, out, kept)
    expected, expected_kept = residual_norm_reference(parts, residual, weight, 1e-5)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(out, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    state.check_own_flags(1, 1, rows)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_rank_that_does_not_come_is_named(stage):
    """Rank 2 of 3, before it tells the others of `stage`; without it the kernel ends."""
    state = Ranks(3, 64, call=7, limit=100)
    state.others_are_there(0)
    state.flags(0)[1, stage, :, 2] = 5  # what it said two calls ago
    x = torch.zeros(16)
    state.run(0, 80, allreduce.all_reduce_launch, x, x, True)
    assert allreduce.describe(state.error.item()) == (2, 7, allreduce.STAGES[stage])


def test_the_waits_of_a_call_share_one_limit():
    """Two ranks that do not come cost little more time than one."""
    instructions = []
    for come in ((1,), ()):
        state = Ranks(3, 64, limit=200)
        for rank in (0, *come):
            state.flags(0)[1, 0, :, rank] = 1
        x = torch.zeros(16)
        instructions.append(state.run(0, 80, allreduce.all_reduce_launch, x, x, False))
        assert allreduce.describe(state.error.item()) == (2 if come else 1, 1, "the data")
    assert instructions[1] < 1.5 * instructions[0]
