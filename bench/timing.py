"""How the operators' benches measure: contenders take turns, the least time counts."""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pypar.selftest import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(text: str) -> argparse.Namespace:
    """--threads and --rounds; sets torch's number of threads."""
    parser = argparse.ArgumentParser(
        description=text.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def bind_threads() -> None:
    """Starts the program again with each OpenMP thread bound to a core of its own, unless the caller has decided.

    Unbound, two threads may share one core for seconds, which moves every figure by a factor of two.
    """
    if "OMP_PROC_BIND" not in os.environ:
        os.environ["OMP_PROC_BIND"] = "true"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def best_seconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of one call of each: the least of all rounds, which other processes disturb least."""
    return {name: min(record) for name, record in measure.times(contenders, rounds=rounds).items()}


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> Callable[[], object]:
    """A call of backward alone, on a graph built once."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in leaves]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    leaves: list[Tensor],
    traffic: tuple[int, int],
    arguments: argparse.Namespace,
) -> str:
    """Checks ours against float64, then one line: forward and backward, each with time, ratio and GB/s.

    leaves: inputs, the differentiable ones requiring grad. traffic: the bytes that forward and backward must
    read or write at least.
    """
    dout = torch.randn(ours(*leaves).shape).to(plain(*leaves).dtype)
    _check(ours, plain, leaves, dout)
    detached = [x.detach() for x in leaves]
    cells = []
    for index, direction in enumerate(("forward", "backward")):
        if index == 0:
            contenders = {"ours": lambda: ours(*detached), "plain": lambda: plain(*detached)}
        else:
            contenders = {
                "ours": gradients(ours, leaves, dout.to(ours(*leaves).dtype)),
                "plain": gradients(plain, leaves, dout),
            }
        seconds = best_seconds(contenders, arguments.rounds)
        cells.append(
            f"{direction} {seconds['ours'] * 1e6:8.0f} us, plain {seconds['plain'] * 1e6:8.0f} us, "
            f"{seconds['plain'] / seconds['ours']:5.2f}x, {traffic[index] / seconds['ours'] / 1e9:5.1f} GB/s"
        )
    return " | ".join(cells)


def _check(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor
) -> None:
    """Output and gradients within twice plain PyTorch's error, and what rounding 0.3 away loses."""

    def run(function: Callable[..., Tensor], double: bool) -> list[Tensor]:
        inputs = [
            x.detach()
            .to(torch.float64 if double and x.is_floating_point() else x.dtype)
            .requires_grad_(x.requires_grad)
            for x in leaves
        ]
        out = function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, dout.to(out.dtype))]

    for i, (actual, expected, exact) in enumerate(
        zip(run(ours, False), run(plain, False), run(plain, True), strict=True)
    ):
        rounded = exact.to(actual.dtype)
        allowed = (
            2 * (expected.double() - exact).abs().max() + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()
        )
        error = (actual.double() - exact).abs().max()
        assert error <= allowed, f"result {i}: error {error:.3g}, allowed {allowed:.3g}"


def print_limit(arguments: argparse.Namespace) -> None:
    rate = measure.copy_rate(rounds=arguments.rounds) / 1e9
    print(f"{arguments.threads} threads; the machine's limit: a copy of 64 MiB moves {rate:.1f} GB/s")
