"""attention against torch's scaled_dot_product_attention in the same run, after a check of results and gradients.

    python bench/attention.py [--threads 1 2] [--rounds 15] [--dtypes fp32 bf16] [--shapes 1,1024,8,8,64]

A shape is B,T,N,G,H with S = T. Both sides take turns; the median of the rounds counts. GFLOP/s count the two products
of forward and the five of backward, half of them if causal. "share" is of the larger rate at which this torch
multiplies 2048^3 matrices in the same dtype on as many threads, by MKL or oneDNN.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pypar.ops import native
from pypar.ops.attention import attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (1, 256, 8, 4, 64),
    (4, 512, 8, 8, 64),
    (1, 1024, 8, 8, 64),
    (1, 1024, 8, 4, 64),
    (1, 4096, 8, 8, 64),
    (1, 4096, 4, 4, 128),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=lambda s: tuple(map(int, s.split(","))))
    return parser.parse_args()


def median_seconds(contenders: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of one call of each, by turns."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for run, record in zip(contenders, times, strict=True):
            started = time.perf_counter()
            run()
            if turn:  # the first one warms up
                record.append(time.perf_counter() - started)
    return [statistics.median(record) for record in times]


def matmul_rate(dtype: torch.dtype, rounds: int) -> float:
    """FLOP/s of x @ w.T at 2048^3 by the faster library of this torch."""
    x, w = torch.randn(2, 2048, 2048).to(dtype).unbind()
    contenders: list[Callable[[], object]] = [lambda: x @ w.T]
    if torch.backends.mkldnn.is_available():
        contenders.append(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    return 2 * 2048**3 / min(median_seconds(contenders, rounds))


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
    ).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attention(q, k, v, causal=causal, backend="native")


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], causal: bool, dout: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs, causal), inputs, dout)


def check(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    """Errors of out and the gradients against fp64, at most twice torch's, or what 0.3 more would lose."""
    inputs, dout = make(shape, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for function, leaves in ((ours, inputs), (torch_attention, inputs), (torch_attention, wide)):
        out = function(*leaves, causal)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for name, actual, peer, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        rounded = exact.to(dtype)
        slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
        error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, peer))
        if error > 2 * allowed + slack:
            raise SystemExit(f"{shape} {dtype}: {name} is off by {error:.3g}, torch's by {allowed:.3g}")


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    B, T, N, G, H = shape
    q, dout = torch.randn(2, B, T, N, H).to(dtype).unbind()
    k, v = torch.randn(2, B, T, G, H).to(dtype).unbind()
    return [x.detach().requires_grad_() for x in (q, k, v)], dout


def lines(shape: tuple[int, ...], dtype: torch.dtype, rate: float, rounds: int) -> Iterator[str]:
    B, T, N, _, H = shape
    for causal in (True, False):
        check((B, min(T, 1024), *shape[2:]), dtype, causal)
        inputs, dout = make(shape, dtype)
        detached = [x.detach() for x in inputs]
        flop = 4 * B * N * T * T * H * (0.5 if causal else 1.0)
        for what, factor in (("forward", 1.0), ("forward+backward", 3.5)):
            contenders = [
                partial(f, *detached, causal)
                if factor == 1.0
                else partial(gradients, f, inputs, causal, dout)
                for f in (ours, torch_attention)
            ]
            mine, peer = median_seconds(contenders, rounds)
            yield (
                f"{'causal' if causal else 'full':6} {what:16} {mine * 1e3:8.2f} ms "
                f"{flop * factor / mine / 1e9:6.0f} GFLOP/s "
                f"share {flop * factor / mine / rate:4.2f} | torch {peer * 1e3:8.2f} ms "
                f"{flop * factor / peer / 1e9:6.0f} GFLOP/s | ratio {peer / mine:4.2f}"
            )


def main() -> None:
    arguments = parse_arguments()
    print(f"instruction set {native.module().selected_isa()}, torch {torch.__version__}")
    for num_threads in arguments.threads:
        torch.set_num_threads(num_threads)
        for name in arguments.dtypes:
            rate = matmul_rate(DTYPES[name], arguments.rounds)
            print(f"\n{num_threads} threads, {name}: 2048^3 matmul {rate / 1e9:.0f} GFLOP/s")
            for shape in arguments.shapes:
                for line in lines(shape, DTYPES[name], rate, arguments.rounds):
                    print("B{} T{} N{} G{} H{}".format(*shape).ljust(24), line, flush=True)


if __name__ == "__main__":
    main()
