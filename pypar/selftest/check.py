"""Runs a case and judges the numbers: the error may be twice what plain PyTorch makes in the same dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.selftest.case import Case, Draw, Function, Inputs

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """What a case's results are compared with, and what it is run with."""

    inputs: Inputs
    douts: list[Tensor]
    plain: Results
    exact: Results


@dataclass(frozen=True)
class Judgement:
    """The result that comes nearest to its allowed error, or exceeds it most."""

    result: str
    error: float
    allowed: float
    failure: str | None


def expect(case: Case, device: str, dtype: torch.dtype) -> Expected:
    inputs = case.inputs(Draw(device, dtype))
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    generator = torch.Generator().manual_seed(7)
    douts = [
        torch.randn(out.shape, generator=generator).to(device, out.dtype)
        for out in outputs(case.plain, inputs)
    ]
    return Expected(
        inputs, douts, results(case, case.plain, inputs, douts), results(case, case.plain, wide, douts)
    )


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
    grads = torch.autograd.grad(
        outs,
        [inputs[name] for name in case.gradients],
        [dout.to(x.dtype) for dout, x in zip(douts, outs, strict=True)],
    )
    names = ["out", "lse"] if len(outs) == 2 else ["out"]
    return {name: x.detach() for name, x in zip(names, outs, strict=True)} | {
        f"d{name}": grad for name, grad in zip(case.gradients, grads, strict=True)
    }


def judge(actual: Results, expected: Expected) -> Judgement:
    judgements = [
        _judge(name, actual[name], expected.plain[name], exact, name.startswith("d"))
        for name, exact in expected.exact.items()
    ]
    failed = [judgement for judgement in judgements if judgement.failure]
    return max(
        failed or judgements, key=lambda j: j.error / j.allowed if j.allowed else math.inf * bool(j.error)
    )


def _judge(name: str, actual: Tensor, plain: Tensor, exact: Tensor, gradient: bool) -> Judgement:
    """A gradient may also lose, twice, what adding and subtracting 0.3 loses: tiny ones are sums of large terms."""
    if actual.shape != exact.shape:
        return Judgement(
            name, math.inf, 0.0, f"{name} is {tuple(actual.shape)} instead of {tuple(exact.shape)}"
        )
    error = _error(actual, exact)
    allowed = 2 * _error(plain, exact)
    if gradient and exact.numel():
        rounded = exact.to(plain.dtype)
        allowed += 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    failure = None if error <= allowed else f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    if not math.isfinite(allowed):
        failure = f"{name}: plain PyTorch has no finite result to compare with"
    return Judgement(name, error, allowed, failure)


def _error(x: Tensor, exact: Tensor) -> float:
    """The largest error; inf where a number is missing. Infinities must be where they belong."""
    if not x.numel():
        return 0.0
    difference = (x.double() - exact).abs().masked_fill(x.double() == exact, 0.0)
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def differs(first: Results, second: Results) -> str | None:
    """Names of the results that are not bitwise equal."""
    return ", ".join(name for name, x in first.items() if not torch.equal(x, second[name])) or None
