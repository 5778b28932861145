"""linear_cross_entropy, a loss with its gradients, against eager PyTorch and torch's chunked loss, after a check.

    python bench/linear_cross_entropy.py [--threads 2] [--rounds 3] [--tokens 2048] [--width 1024] [--words 8192]

The share is that of the rate of a large matmul in the same run, counted as three products; in bf16 of the faster of
both dtypes. Memory is the peak beyond inputs and gradients, as a share of the logits in that dtype; a bf16 weight's
gradient is summed in fp32, which is what must be there beside them, and is counted apart too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pypar.bench import timing
from pypar.ops.linear_cross_entropy import linear_cross_entropy
from pypar.selftest.cases.linear_cross_entropy import case
from pypar.selftest.judge import check_case

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "pypar": linear_cross_entropy,
        "eager": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target),
    }
    try:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
    except ImportError:  # before torch 2.13
        return found
    chunks = LinearCrossEntropyOptions()
    found["torch chunked"] = lambda *given: F.linear_cross_entropy(*given, options=chunks)
    return found


def memory_bytes(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) << 10


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, int, float]:
    """(seconds, bytes of the peak beyond inputs and gradients, the loss)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = memory_bytes("VmRSS"), time.perf_counter()
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs[:2])
    seconds = time.perf_counter() - began
    peak = memory_bytes("VmHWM") - before - sum(x.nbytes for x in gradients)
    return seconds, peak, value.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--words", type=int, default=8192)
    parser.add_argument("--dtypes", default="fp32,bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    T, H, V = arguments.tokens, arguments.width, arguments.words
    rates = {name: timing.matmul_rate(timing.DTYPES[name], rounds=3) for name in ("fp32", "bf16")}
    rates["bf16"] = max(rates.values())
    print(
        f"{arguments.threads} threads; hidden [{T}, {H}], weight [{V}, {H}]; matmul {rates['fp32'] / 1e9:.0f} GFLOP/s"
    )
    for name in arguments.dtypes.split(","):
        dtype = timing.DTYPES[name]
        check_case(case((192,), 64, 1111), dtype, None)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(V, H, generator=generator) / H**0.5).to(dtype).requires_grad_()
        inputs = hidden, weight, torch.randint(V, (T,), generator=generator)
        for loss in contenders().values():  # what torch loads when it first runs
            torch.autograd.grad(loss(hidden[:64], weight[:64], inputs[2][:64] % 64), weight)
        best: dict[str, tuple[float, int, float]] = {}
        for _ in range(arguments.rounds):
            for key, loss in contenders().items():
                found = step(loss, inputs)
                best[key] = min(best.get(key, found), found)
        for key, (seconds, peak, value) in best.items():
            share = 6 * T * H * V / seconds / rates[name]
            sums = V * H * (4 - dtype.itemsize)  # of the weight's gradient in fp32, beyond that gradient
            rest = (peak - sums) / (T * V * dtype.itemsize)
            apart = f" ({rest:.0%} but for the weight gradient's fp32 sum)" if sums and key == "pypar" else ""
            print(
                f"{name} {key:13}: {seconds:7.3f} s, {seconds / best['pypar'][0]:5.2f}x pypar's, "
                f"{share:4.0%} of matmul, peak {peak / 2**20:6.0f} MiB = "
                f"{peak / (T * V * dtype.itemsize):4.0%} of the logits{apart}, loss {value:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
