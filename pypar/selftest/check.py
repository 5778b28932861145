"""Runs a case and judges the numbers: the error may be twice what plain PyTorch makes in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.selftest.case import Case, Draw, Function, Inputs
from pypar.selftest.orders import in_orders

Results = dict[str, Tensor]

# The largest error in fp32 is a matter of luck: attention's dq had 2.1 times plain PyTorch's in one of 24 draws of the
# inputs, and at most 1.5 times in four draws together. In 16 bits rounding decides.
_DRAWS = {torch.float32: 4}


@dataclass(frozen=True)
class Expected:
    """What a case is run with, one draw of its inputs, and what its results are compared with."""

    inputs: Inputs
    douts: list[Tensor]
    plains: list[Results]  # what PyTorch makes in the case's type, in several orders of summation
    exact: Results


@dataclass(frozen=True)
class Judgement:
    """A result's largest error beside the allowed one, and what is wrong with it."""

    result: str
    error: float
    allowed: float
    failure: str | None


def expect(case: Case, device: str, dtype: torch.dtype) -> list[Expected]:
    """One for each draw of the inputs that judging this dtype takes."""
    count = _DRAWS.get(dtype, 1)
    return [_expect(case, device, dtype, draw, count) for draw in range(count)]


def _expect(case: Case, device: str, dtype: torch.dtype, draw: int, count: int) -> Expected:
    inputs = case.inputs(Draw(device, dtype, seed=draw))
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    generator = torch.Generator().manual_seed(7)
    found = outputs(case.plain, inputs)
    douts = [torch.randn(out.shape, generator=generator).to(device, out.dtype) for out in found]
    fewest = min(x.numel() for x in (*found, *(inputs[name] for name in case.gradients)))
    plains = in_orders(lambda: results(case, case.plain, inputs, douts), dtype, fewest, draw, count)
    return Expected(inputs, douts, plains, results(case, case.plain, wide, douts))


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
    """The result that comes nearest to its allowed error, or exceeds it most; `actual` has one for each draw.

    Of all draws the largest error counts, ours and plain PyTorch's.
    """
    judgements = [
        _largest(
            [
                judge_result(
                    name,
                    found[name],
                    [plain[name] for plain in draw.plains],
                    draw.exact[name],
                    gradient=name.startswith("d"),
                )
                for found, draw in zip(actual, expected, strict=True)
            ]
        )
        for name in expected[0].exact
    ]
    failed = [judgement for judgement in judgements if judgement.failure]
    return max(
        failed or judgements, key=lambda j: j.error / j.allowed if j.allowed else math.inf * bool(j.error)
    )


def _largest(draws: Sequence[Judgement]) -> Judgement:
    """One result's judgement over all draws: what one of them exceeds, another may allow."""
    worst = max(draws, key=lambda j: j.error)
    allowed = max(j.allowed for j in draws)
    if math.isfinite(allowed) and worst.error <= allowed:
        return Judgement(worst.result, worst.error, allowed, None)
    wrong = next((j for j in draws if not math.isfinite(j.error) or not math.isfinite(j.allowed)), worst)
    return Judgement(worst.result, worst.error, allowed, wrong.failure)


def judge_result(
    name: str,
    actual: Tensor,
    plains: Sequence[Tensor],
    exact: Tensor,
    *,
    gradient: bool = False,
    plain_exact: Tensor | None = None,
) -> Judgement:
    """The rule for one result: at most twice the largest error of `plains`, PyTorch's results in actual's dtype.

    `exact` is the float64 result for the same inputs; infinities must be where it has them. A gradient may also
    lose, twice, what adding and subtracting 0.3 loses: tiny ones are sums of large terms. plain_exact: what `plains`
    are compared with, where their intermediate results make that another.
    """
    if actual.shape != exact.shape or actual.dtype != plains[0].dtype:
        wrong = f"{name} is {actual.dtype} {tuple(actual.shape)} instead of {plains[0].dtype} {tuple(exact.shape)}"
        return Judgement(name, math.inf, 0.0, wrong)
    error = largest_error(actual, exact)
    allowed = 2 * max(largest_error(plain, exact if plain_exact is None else plain_exact) for plain in plains)
    if not math.isfinite(allowed):
        return Judgement(name, error, allowed, f"{name}: PyTorch has no finite result to compare with")
    if gradient and exact.numel():
        rounded = exact.to(actual.dtype)
        allowed += 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    wrong = f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return Judgement(name, error, allowed, wrong if error > allowed else None)


def largest_error(x: Tensor, exact: Tensor) -> float:
    """inf where a number is missing. Infinities must be where they belong."""
    if not x.numel():
        return 0.0
    difference = (x.double() - exact).abs().masked_fill(x.double() == exact, 0.0)
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def differs(first: Results, second: Results) -> str | None:
    """Names of the results that are not bitwise equal."""
    return ", ".join(name for name, x in first.items() if not torch.equal(x, second[name])) or None
