"""adamw against torch's fused update and, for moments in 8 bits, bitsandbytes, after a check of the results.

    python bench/adamw.py [--threads 2] [--rounds 15]

"three passes" converts a bf16 gradient to fp32, runs torch's fused update of the master, and converts that to the bf16
parameter. Where bitsandbytes is not installed its place is taken by the same update in plain PyTorch: codes to fp32,
the update, codes again. GB/s counts the bytes that must move at least, written in front: 28 B a parameter at the
copy's rate is the bound. The share is of that rate.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import torch

from pypar.bench import timing
from pypar.ops.adamw import adamw
from pypar.selftest import judge
from pypar.selftest.cases import adamw as cases
from pypar.selftest.compare import parse_arguments, print_limit

COUNT = 1 << 24


def main() -> None:
    arguments = parse_arguments(__doc__)
    for form in (cases.PLAIN, cases.MASTER, cases.SAME):
        for dtype in (torch.float32, torch.bfloat16):
            judge.check_case(cases.case(100_003, form), dtype, backend=None)
    print_limit(arguments)
    fp32, bf16 = torch.float32, torch.bfloat16
    for what, form, dtype, peer, peer_form, size in (
        ("fp32", cases.PLAIN, fp32, "fused", cases.PLAIN, 28),
        ("bf16, master and moments in fp32", cases.MASTER, bf16, "three passes", cases.MASTER, 28),
        ("bf16 alone", cases.SAME, bf16, "fused", cases.SAME, 14),
        ("bf16 alone, rounded stochastically", cases.STOCHASTIC, bf16, "fused", cases.SAME, 14),
        ("bf16, master in fp32, moments in 8 bits", cases.EIGHT_BITS, bf16, "8 bits", cases.EIGHT_BITS, 16),
    ):
        measure(what, form, dtype, _PEERS[peer](peer_form, dtype), size, arguments.rounds)


def measure(
    what: str,
    form: cases.Form,
    dtype: torch.dtype,
    peer: tuple[str, Callable[[], object]],
    size: int,
    rounds: int,
) -> None:
    """Prints a line; size: bytes a parameter."""
    tensors = cases.state(COUNT, form, dtype)
    update = cases.UPDATE if form.seed is None else dataclasses.replace(cases.UPDATE, seed=form.seed)
    name, run = peer
    seconds = timing.best_seconds({"ours": lambda: adamw(**tensors, update=update), "peer": run}, rounds)
    ours, bytes_moved = seconds["ours"], size * COUNT
    share = bytes_moved / ours / timing.copy_rate(rounds=rounds)
    print(
        f"{size} B a parameter, {what}: {ours / COUNT * 1e9:.2f} ns a parameter, {bytes_moved / ours / 1e9:.1f} GB/s "
        f"({share:.0%} of the copy); {name} {seconds['peer'] / COUNT * 1e9:.2f} ns, {seconds['peer'] / ours:.2f}x",
        flush=True,
    )


def fused(form: cases.Form, dtype: torch.dtype) -> tuple[str, Callable[[], object]]:
    state = cases.state(COUNT, form, dtype)
    lists = [state[name] for name in ("params", "gradients", "exp_avgs", "exp_avg_sqs")]
    return "torch fused", lambda: cases.fused(*lists)


def three_passes(form: cases.Form, dtype: torch.dtype) -> tuple[str, Callable[[], object]]:
    state = cases.state(COUNT, form, dtype)
    (param,), (gradient,), masters = state["params"], state["gradients"], state["masters"]
    wide = gradient.float()

    def run() -> None:
        wide.copy_(gradient)
        cases.fused(masters, [wide], state["exp_avgs"], state["exp_avg_sqs"])
        param.copy_(masters[0])

    return "torch's three passes", run


def in_eight_bits(form: cases.Form, dtype: torch.dtype) -> tuple[str, Callable[[], object]]:
    if importlib.util.find_spec("bitsandbytes") is None:
        state = cases.state(COUNT, form, dtype)
        return "plain PyTorch in 8 bits", lambda: adamw(**state, update=cases.UPDATE, backend="reference")
    import bitsandbytes

    param = torch.nn.Parameter(torch.randn(COUNT).to(dtype))
    param.grad = torch.randn(COUNT).to(dtype)
    optimizer = bitsandbytes.optim.AdamW8bit([param], lr=cases.UPDATE.lr, betas=cases.UPDATE.betas)
    return "bitsandbytes", optimizer.step


_PEERS = {"fused": fused, "three passes": three_passes, "8 bits": in_eight_bits}


if __name__ == "__main__":
    main()
