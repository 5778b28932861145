"""Attention's kernels with their arguments: lists of launches, made from metadata alone.

A list can be run, compiled for a device that is not there, or run elsewhere. `problem` is what
pypar.ops.attention makes
(read here, not imported): q, k, v, options and positions.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_backward_keys import _attention_dkdv_kernel
from .attention_backward_queries import _attention_delta_kernel, _attention_dq_kernel
from .attention_configurations import (
    DECODE,
    FORWARD,
    KEY_GRADIENTS,
    QUERY_GRADIENT,
    Tile,
    architecture,
    choose_tile,
)
from .attention_forward import _attention_combine_kernel, _attention_forward_kernel
from .attention_operands import Sizes, is_plain, operands, options, padded, sizes, strides_of
from .launch import Launch


@dataclass(frozen=True)
class Device:
    """arch: a class of architecture. num_multiprocessors: how many programs fill the device."""

    arch: str
    num_multiprocessors: int

    @property
    def reads_by_async_proxy(self) -> bool:
        """Whether its products read shared memory so: wgmma. (tcgen05 does too, where Triton 3.7 cannot compile
        show_copies.)"""
        return self.arch == "sm_90"


def forward_launches(
    problem: Any, device: Device, out: Tensor, lse: Tensor, carry: bool, splits: int | None = None
) -> list[Launch]:
    """Writes out and lse, or continues them if carry. splits: programs that share a block's keys, None:
    chosen."""
    size = sizes(problem)
    T, N, G = size.T, size.N, size.G
    tile, pack = _forward_tile(problem, device.arch)
    num_blocks = _num_blocks(problem.cu_seqlens_q, T * pack, size.B, tile.BLOCK_T)
    num_programs = num_blocks * (N // pack) * _grid_batch(size)
    if splits is None:
        splits = _choose_splits(problem, size, tile, num_programs, device.num_multiprocessors)
    rows, split = lse.numel(), splits > 1
    part = out.new_empty((splits, rows, size.Hv), dtype=torch.float32) if split else None
    state = lse.new_empty((splits, 2, rows)) if split else None
    parts = {"part_ptr": part, "state_ptr": state, "splits": splits}
    arguments = {
        **operands(problem),
        "out_ptr": out,
        "lse_ptr": lse,
        **parts,
        "sinks_ptr": None if split else problem.sinks,
        **strides_of("o", out, "btnh"),
        "GROUP": N // G,
        "PACK": pack,
        "PLAIN": is_plain(problem),
        "CARRY": carry and not split,
        "SPLIT": split,
        "FENCE": device.reads_by_async_proxy,
    }
    heads = N // pack * splits
    launches = [_launch_of_blocks(_attention_forward_kernel, problem, tile, num_blocks, heads, arguments)]
    if split:
        arguments = {**parts, "sinks_ptr": problem.sinks, "CARRY": carry}
        launches.append(_launch_of_rows(_attention_combine_kernel, problem, out, lse, 4, arguments))
    return launches


def backward_launches(
    problem: Any,
    device: Device,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    accumulate: bool,
    dbias: Tensor | None,
) -> list[Launch]:
    """Writes dq, dk, dv, or adds to them; writes dbias where keys are seen."""
    dq, dk, dv = gradients
    size = sizes(problem)
    delta, lse_ready = torch.empty_like(lse), torch.empty_like(lse)
    of_rows = {
        "dout_ptr": dout,
        "lse_ready_ptr": lse_ready,
        "delta_ptr": delta,
        **strides_of("d", dout, "btnh"),
    }
    shared = {
        **operands(problem),
        **of_rows,
        "G": size.G,
        "dscale": problem.scale,
        "ACCUMULATE": accumulate,
        "FENCE": device.reads_by_async_proxy,
    }
    of_keys = {
        **shared,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **strides_of("dk", dk, "bsgh"),
        **strides_of("dv", dv, "bsgh"),
    }
    of_queries = {**shared, "dq_ptr": dq, "dbias_ptr": dbias, **strides_of("dq", dq, "btnh")}
    keys, queries = (_tile(table, problem, device.arch) for table in (KEY_GRADIENTS, QUERY_GRADIENT))
    num_keys = _num_blocks(problem.cu_seqlens_k, size.S, size.B, keys.BLOCK_S)
    num_queries = _num_blocks(problem.cu_seqlens_q, size.T, size.B, queries.BLOCK_T)
    return [
        _launch_of_rows(_attention_delta_kernel, problem, out, lse, 16, {**of_rows, "dlse_ptr": dlse}),
        _launch_of_blocks(_attention_dkdv_kernel, problem, keys, num_keys, size.G, of_keys),
        _launch_of_blocks(_attention_dq_kernel, problem, queries, num_queries, size.N, of_queries),
    ]


def _launch_of_rows(
    kernel: Any, problem: Any, out: Tensor, lse: Tensor, block_rows: int, arguments: dict[str, Any]
) -> Launch:
    """A kernel that walks over rows (batch, head, query) of out and lse."""
    size, rows = sizes(problem), lse.numel()
    arguments = {
        **arguments,
        "out_ptr": out,
        "lse_ptr": lse,
        **strides_of("o", out, "btnh"),
        "rows": rows,
        "T": size.T,
        "N": size.N,
        "HV": size.Hv,
        "BLOCK_HV": padded(size.Hv),
        "BLOCK_ROWS": block_rows,
        "PRECISE": problem.q.dtype == torch.float32,
    }
    return Launch(kernel, triton.cdiv(rows, block_rows), arguments, 4, 1)


def _launch_of_blocks(
    kernel: Any, problem: Any, tile: Tile, num_blocks: int, heads: int, arguments: dict[str, Any]
) -> Launch:
    """A kernel with a program for each of num_blocks blocks of each of `heads` in each batch element."""
    arguments = {**arguments, **options(problem, tile), "num_blocks": num_blocks}
    num_programs = num_blocks * heads * _grid_batch(sizes(problem))
    return Launch(kernel, num_programs, arguments, tile.num_warps, tile.num_stages)


def _tile(table: dict, problem: Any, arch: str) -> Tile:
    size = sizes(problem)
    block_h = padded(max(size.H, size.Hv))
    return choose_tile(table, arch, block_h, problem.q.dtype == torch.float32)


def _forward_tile(problem: Any, arch: str) -> tuple[Tile, int]:
    """(tile, how many heads of a group share its rows): all of them where one head's queries would not fill
    a tile."""
    size = sizes(problem)
    group = size.N // size.G
    T = size.T // max(size.B, 1) if size.varlen else size.T
    tile = _tile(FORWARD, problem, arch)
    pack = group if T < tile.BLOCK_T else 1
    if T * pack <= 16:
        tile = _tile(DECODE, problem, arch)
    return tile, pack


def _num_blocks(cu_seqlens: Tensor | None, rows: int, B: int, block: int) -> int:
    """With sequences of unknown lengths each may end in a block that is not full."""
    return triton.cdiv(rows, block) + (B if cu_seqlens is not None else 0)


def _grid_batch(size: Sizes) -> int:
    return 1 if size.varlen else size.B


def _choose_splits(problem: Any, size: Sizes, tile: Tile, num_programs: int, num_multiprocessors: int) -> int:
    """Splits fill the device while each keeps four blocks of keys: fewer do not pay for the combination."""
    keys = size.S // max(size.B, 1) if size.varlen else size.S
    if problem.left != -1 and problem.right != -1:
        keys = min(keys, problem.left + problem.right + tile.BLOCK_T)
    wanted = 2 * num_multiprocessors // max(num_programs, 1)
    return max(1, min(wanted, keys // (4 * tile.BLOCK_S), 128))


@functools.cache
def device_of(device: torch.device) -> Device:
    """What is known of a CUDA device; of a CPU, where the interpreter runs, a small stand-in."""
    if device.type != "cuda":
        return Device("interpreter", 16)
    properties = torch.cuda.get_device_properties(device)
    return Device(architecture((properties.major, properties.minor)), properties.multi_processor_count)
