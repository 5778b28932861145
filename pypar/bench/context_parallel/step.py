"""One step of context-parallel attention, forward and backward, as a rank runs it, and what can be left out of it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pypar
from pypar.comm import Handle
from pypar.context_parallel import ring_attention, shard
from pypar.context_parallel.layouts import positions_of
from pypar.context_parallel.methods import all_gather, same_bits, ulysses
from pypar.context_parallel.methods.ring import buffers as ring_buffers
from pypar.context_parallel.methods.ring import method as ring
from pypar.mesh import Axis

METHOD_MODULES = (ring, all_gather, same_bits, ulysses, ring_buffers)
SAMPLED = 256  # positions that are compared


@dataclass(frozen=True)
class Problem:
    """B 1. window: how many keys before its own a query sees; None: all."""

    length: int
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    N: int = 8
    G: int = 2
    H: int = 64
    window: int | None = None

    @property
    def sides(self) -> tuple[int | None, int | None] | None:
        return None if self.window is None else (self.window, 0 if self.causal else None)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        seen = "" if self.window is None else f", window {self.window}"
        return f"{self.length} tokens, {str(self.dtype).removeprefix('torch.')}, {mask}{seen}"


class Contender(NamedTuple):
    """A method over the ranks. communicates: False leaves out the communication, True the attention, None nothing."""

    method: str
    layout: str = "zigzag"
    communicates: bool | None = None


class Timed(NamedTuple):
    """began, ended: of one clock for all processes. waited: blocked for communication; sent: bytes."""

    began: float
    ended: float
    waited: float = 0.0
    sent: int = 0


@functools.lru_cache(maxsize=2)
def inputs(problem: Problem) -> list[Tensor]:
    """q, k, v, dout of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    heads = (problem.N, problem.G, problem.G, problem.N)
    shapes = [(1, problem.length, n, problem.H) for n in heads]
    return [torch.randn(shape, generator=generator).to(problem.dtype) for shape in shapes]


@functools.lru_cache(maxsize=4)
def parts(axis: Axis, problem: Problem, layout: str) -> list[Tensor]:
    return [shard(x, 1, axis, layout).clone() for x in inputs(problem)]


def step(axis: Axis, problem: Problem, contender: Contender) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of this rank."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            q,
            k,
            v,
            axis,
            layout=contender.layout,
            method=contender.method,
            causal=problem.causal,
            window=problem.sides,
        )

    return _with_gradients(attend, parts(axis, problem, contender.layout))


def single_step(problem: Problem, peer: bool = False) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of the whole sequence in this process; peer: by torch's attention."""

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if problem.window is None else _seen(problem)
        is_causal = problem.causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
        return out.transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pypar.attention(q, k, v, causal=problem.causal, window=problem.sides)

    return _with_gradients(torch_attention if peer else ours, inputs(problem))


@functools.lru_cache(maxsize=1)
def _seen(problem: Problem) -> Tensor:
    """bool [length, length]: torch has no window."""
    ages = torch.arange(problem.length)[:, None] - torch.arange(problem.length)
    assert problem.window is not None
    return (ages <= problem.window) & ((ages >= 0) | (not problem.causal))


def _with_gradients(attend: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def timed_step(axis: Axis, problem: Problem, contender: Contender) -> Timed:
    left_out: dict[bool | None, contextlib.AbstractContextManager] = {
        None: contextlib.nullcontext(),
        False: without_communication(),
        True: without_attention(),
    }
    parts(axis, problem, contender.layout)
    with left_out[contender.communicates]:
        step(axis, problem, contender)  # after a pause the first one is slower, on all sides
        if axis.size > 1:
            dist.barrier()
        before = axis.traffic.snapshot()
        began = time.perf_counter()
        step(axis, problem, contender)
        ended = time.perf_counter()
    after = axis.traffic
    return Timed(began, ended, after.wait_seconds - before.wait_seconds, after.bytes_sent - before.bytes_sent)


def timed_single(axis: Axis, problem: Problem, peer: bool) -> Timed:
    single_step(problem, peer)
    began = time.perf_counter()
    single_step(problem, peer)
    return Timed(began, time.perf_counter())


def sample(problem: Problem) -> Tensor:
    """Some positions of the whole sequence, ascending."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(problem.length, generator=generator)[:SAMPLED].sort().values


def sampled_step(axis: Axis, problem: Problem, contender: Contender) -> list[dict[int, Tensor]]:
    """For out, dq, dk and dv: position -> [heads, H], at the sampled positions of this rank."""
    held = positions_of(problem.length, axis.rank, axis.size, contender.layout)
    rows = torch.isin(held, sample(problem)).nonzero().flatten()
    return [{int(held[row]): x[0, row].float() for row in rows} for x in step(axis, problem, contender)]


def sampled_single(axis: Axis, problem: Problem) -> list[dict[int, Tensor]]:
    return [{int(t): x[0, t].float() for t in sample(problem)} for x in single_step(problem)]


def check(
    by_rank: list[list[dict[int, Tensor]]], expected: list[dict[int, Tensor]], dtype: torch.dtype
) -> None:
    """AssertionError where the ranks' results are not the single process's."""
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        ours = {position: row for results in by_rank for position, row in results[index].items()}
        assert ours.keys() == expected[index].keys()
        a, b = (torch.stack([rows[t] for t in sorted(rows)]) for rows in (ours, expected[index]))
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error <= allowed, f"{name} differs from the single process's by {error:.2g}"


@functools.lru_cache(maxsize=64)
def _stand_in(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that would have arrived: usual numbers, as strange ones may take longer."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@contextlib.contextmanager
def without_communication() -> Iterator[None]:
    """Nothing is sent, and what would arrive is there at once; results are wrong."""

    def exchange(sends: Any, receives: Any, axis: Axis, tag: int = 0) -> tuple[list[Handle], list[Handle]]:
        arrived = [Handle(_stand_in(buffer.shape, buffer.dtype)) for buffer, _ in receives]
        return [Handle(x) for x, _ in sends], arrived

    def gather(x: Tensor, axis: Axis, dim: int = 0) -> Handle:
        return Handle(_stand_in(torch.cat([x] * axis.size, dim).shape, x.dtype))

    def scatter(x: Tensor, axis: Axis, dim: int = 0) -> Handle:
        return Handle(x.narrow(dim, 0, x.shape[dim] // axis.size))

    with _replaced(exchange_start=exchange, all_gather_start=gather, reduce_scatter_start=scatter):
        yield


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """Everything is sent, nothing computed; results are wrong."""
    with _replaced(add_forward=lambda *_: None, add_backward=lambda *_: None, forward_once=lambda *_: False):
        yield


@contextlib.contextmanager
def _replaced(**functions: Any) -> Iterator[None]:
    """Names that the methods import, wherever they do."""
    with contextlib.ExitStack() as stack:
        for module in METHOD_MODULES:
            for name, function in functions.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        yield
