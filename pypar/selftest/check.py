"""Runs a case and judges the numbers: the error may be twice what plain PyTorch makes in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.selftest.case import Case, Draw, Function, Inputs

Results = dict[str, Tensor]

# In fp32 the largest error is a matter of luck: of a few rows that see few keys. In 16 bits rounding decides.
_DRAWS = {torch.float32: 4}


@dataclass(frozen=True)
class Expected:
    """What a case's results are compared with, and what it is run with."""

    inputs: Inputs
    douts: list[Tensor]
    torch: list[Results]  # what PyTorch makes in the case's type
    exact: Results


@dataclass(frozen=True)
class Judgement:
    """The result that comes nearest to its allowed error, or exceeds it most."""

    result: str
    error: float
    allowed: float
    failure: str | None


def draws(case: Case, device: str, dtype: torch.dtype) -> list[Expected]:
    """As many as it takes to judge this dtype."""
    return [_expect(case, device, dtype, seed) for seed in range(_DRAWS.get(dtype, 1))]


def _expect(case: Case, device: str, dtype: torch.dtype, seed: int) -> Expected:
    inputs = case.inputs(Draw(device, dtype, seed))
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    generator = torch.Generator().manual_seed(7)
    douts = [
        torch.randn(out.shape, generator=generator).to(device, out.dtype)
        for out in outputs(case.plain, inputs)
    ]
    found = [results(case, function, inputs, douts) for function in (case.plain, case.fused) if function]
    return Expected(inputs, douts, found, results(case, case.plain, wide, douts))


@torch.no_grad()
def outputs(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    out = function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def leaves(inputs: Inputs, gradients: tuple[str, ...]) -> Inputs:
    return {name: x.detach().requires_grad_(name in gradients) for name, x in inputs.items()}


def results(case: Case, function: Function, inputs: Inputs, douts: list[Tensor]) -> Results:
    """Outputs and gradients by name."""
    inputs = leaves(inputs, case.gradients)
    out = function(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads: tuple[Tensor, ...] = ()
    if case.gradients:
        grads = torch.autograd.grad(
            outs,
            [inputs[name] for name in case.gradients],
            [dout.to(x.dtype) for dout, x in zip(douts, outs, strict=True)],
        )
    names = ["out", "lse"] if len(outs) == 2 else ["out"]
    return {name: x.detach() for name, x in zip(names, outs, strict=True)} | {
        f"d{name}": grad for name, grad in zip(case.gradients, grads, strict=True)
    }


def judge(actual: Sequence[Results], expected: Sequence[Expected]) -> Judgement:
    """One result of each, for each draw of the inputs: the largest error of all draws counts, on both sides."""
    judgements = [_judge(name, actual, expected) for name in expected[0].exact]
    failed = [judgement for judgement in judgements if judgement.failure]
    return max(
        failed or judgements, key=lambda j: j.error / j.allowed if j.allowed else math.inf * bool(j.error)
    )


def _judge(name: str, actual: Sequence[Results], expected: Sequence[Expected]) -> Judgement:
    """A gradient may also lose, twice, what adding and subtracting 0.3 loses: tiny ones are sums of large terms."""
    error = allowed = lost = 0.0
    for found, e in zip(actual, expected, strict=True):
        ours, exact = found[name], e.exact[name]
        if ours.shape != exact.shape:
            wrong = f"{name} is {tuple(ours.shape)} instead of {tuple(exact.shape)}"
            return Judgement(name, math.inf, 0.0, wrong)
        error = max(error, _error(ours, exact))
        allowed = max(allowed, *(2 * _error(results[name], exact) for results in e.torch))
        if name.startswith("d") and exact.numel():
            rounded = exact.to(e.torch[0][name].dtype)
            lost = max(lost, 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item())
    allowed += lost
    if not math.isfinite(allowed):
        return Judgement(name, error, allowed, f"{name}: PyTorch has no finite result to compare with")
    wrong = f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return Judgement(name, error, allowed, wrong if error > allowed else None)


def _error(x: Tensor, exact: Tensor) -> float:
    """The largest error; inf where a number is missing. Infinities must be where they belong."""
    if not x.numel():
        return 0.0
    difference = (x.double() - exact).abs().masked_fill(x.double() == exact, 0.0)
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def differs(first: Results, second: Results) -> str | None:
    """Names of the results that are not bitwise equal."""
    return ", ".join(name for name, x in first.items() if not torch.equal(x, second[name])) or None
