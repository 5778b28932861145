"""One attention layer, forward and backward, over 131,072 tokens: 4 ranks beside one process, and their memory.

B 1, N 2, G 1, H 64, causal, zigzag. A rank never holds more than its part of the sequence. Memory is what a process
takes at most beyond what it took before its inputs were there. The results of 256 positions are compared with the
single process's, out and dq of 64 of them with plain attention in fp64.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from pypar.bench.context_parallel.step import SAMPLED, Problem, check, sample
from pypar.bench.context_parallel.workers import Workers
from pypar.bench.timing import DTYPES
from pypar.context_parallel import ring_attention
from pypar.context_parallel.layouts import positions_of, segments_of
from pypar.mesh import Axis

LENGTH, SIZE, LAYOUT = 131072, 4, "zigzag"
ASKED = 1 / 3  # of the single process's memory, for a rank
_BLOCK = 1024  # positions that one seed makes
_EXACT = 64


def part_of(problem: Problem, rank: int, size: int) -> list[Tensor]:
    """q, k, v, dout of a rank, made without those of the others."""
    heads = (problem.N, problem.G, problem.G, problem.N)
    segments = segments_of(problem.length, rank, size, LAYOUT)
    count = sum(segment.count for segment in segments)
    tensors = [torch.empty(1, count, n, problem.H, dtype=problem.dtype) for n in heads]
    row = 0
    for segment in segments:
        assert segment.start % _BLOCK == segment.count % _BLOCK == 0
        for first in range(segment.start, segment.start + segment.count, _BLOCK):
            generator = torch.Generator().manual_seed(first)
            for x in tensors:
                x[0, row : row + _BLOCK] = torch.randn(_BLOCK, *x.shape[2:], generator=generator)
            row += _BLOCK
    return tensors


def _memory_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def measured_step(axis: Axis, problem: Problem) -> tuple[float, int, list[dict[int, Tensor]]]:
    """(seconds, bytes, sampled positions of out, dq, dk, dv)."""
    warm = [torch.ones(1, 16, n, problem.H, dtype=problem.dtype) for n in (problem.N, problem.G)]
    # All that torch loads when it first differentiates like this.
    torch.autograd.grad(
        ring_attention(warm[0].requires_grad_(), warm[1], warm[1], axis), warm[0], warm[0].detach()
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory_bytes("VmRSS")
    q, k, v, dout = part_of(problem, axis.rank, axis.size)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    began = time.perf_counter()
    out = ring_attention(q, k, v, axis, layout=LAYOUT)
    results = out.detach(), *torch.autograd.grad(out, leaves, dout)
    seconds = time.perf_counter() - began
    peak = _memory_bytes("VmHWM") - before
    held = positions_of(problem.length, axis.rank, axis.size, LAYOUT)
    rows = torch.isin(held, sample(problem)).nonzero().flatten()
    return seconds, peak, [{int(held[row]): x[0, row].float() for row in rows} for x in results]


def exact_errors(problem: Problem, results: list[dict[int, Tensor]]) -> list[float]:
    """Largest error of out and dq at some positions, as a share of the largest value, against fp64."""
    q, k, v, dout = (x[0] for x in part_of(problem, 0, 1))
    errors: list[list[Tensor]] = [[], []]
    rows = sample(problem)[:: SAMPLED // _EXACT].tolist()
    for t in rows:
        keys, values = (x[: t + 1, 0].double() for x in (k, v))
        scale = problem.H**-0.5
        p = (q[t].double() @ keys.T * scale).softmax(-1)
        dp = dout[t].double() @ values.T
        exact = p @ values, (p * (dp - (p * dp).sum(-1, keepdim=True))) @ keys * scale
        for found, x, reference in zip(errors, results, exact, strict=False):
            found.append(torch.stack([(x[t].double() - reference).abs().max(), reference.abs().max()]))
    return [(worst[0] / worst[1]).item() for worst in (torch.stack(found).amax(0) for found in errors)]


def main(arguments: argparse.Namespace) -> str | None:
    # The least accurate, and fastest, dtype unless one was asked for.
    dtype = arguments.dtypes[0] if len(arguments.dtypes) == 1 else "bf16"
    problem = Problem(LENGTH, DTYPES[dtype], N=2, G=1)
    # What is given back counts no more: otherwise malloc keeps blocks of up to 32 MiB, which are all of a rank's.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    with Workers(SIZE, arguments.backend) as workers:
        by_rank = workers.ranks(measured_step, problem)
        single_s, single_bytes, expected = workers.single(measured_step, problem)
    results = [samples for _, _, samples in by_rank]
    check(results, expected, problem.dtype)
    whole = [{t: row for samples in results for t, row in samples[i].items()} for i in range(4)]
    out, dq = exact_errors(problem, whole)
    most = max(num_bytes for _, num_bytes, _ in by_rank)
    print(
        f"{LENGTH} tokens, {dtype}: {SIZE} ranks {max(s for s, _, _ in by_rank):.1f} s, one process {single_s:.1f} s "
        f"with {workers.threads} threads\n"
        f"memory: a rank {most / 1e6:.0f} MB, one process {single_bytes / 1e6:.0f} MB: {most / single_bytes:.2f} of "
        f"it, asked at most {ASKED:.2f}\n"
        f"{SAMPLED} positions agree with the process; against fp64, out within {out:.1e}, dq within {dq:.1e}"
    )
    return None if most <= ASKED * single_bytes else "a rank takes more memory than asked"
