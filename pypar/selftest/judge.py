"""The rule of accuracy: an operator's error may be twice what plain PyTorch makes in the same dtype.

Tests, self-test and benches judge by this file alone. What plain PyTorch makes is taken in several orders of
summation (orders.py), so that the verdict is the same whatever BLAS the machine has.

    expected = expect(plain, inputs, douts)         the results of a plain function by name, and float64's
    expected.check("dq", dq)                        AssertionError with a sentence where dq exceeds the rule
    check_case(case, dtype, backend)                all results of a case by a backend
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.selftest.case import Case, Draw, Function, Inputs
from pypar.selftest.orders import in_orders

Results = dict[str, Tensor]  # outputs by the names below, gradients as "d" and the input's name

OUTPUTS = ("out", "lse")

# The largest error in fp32 is a matter of luck: attention's dq had 2.1 times plain PyTorch's in one of 24 draws of the
# inputs, and at most 1.5 times in four draws together. In 16 bits rounding decides.
_DRAWS = {torch.float32: 4}


@dataclass(frozen=True)
class Judgement:
    """A result's largest error beside the allowed one, and what is wrong with it."""

    result: str
    error: float
    allowed: float
    failure: str | None

    def check(self) -> None:
        """AssertionError where something is wrong with it."""
        assert self.failure is None, self.failure


@dataclass(frozen=True)
class Expected:
    """Inputs, gradients of the outputs, and what results for them are compared with."""

    inputs: Inputs
    douts: list[Tensor]
    plains: list[Results]  # what PyTorch makes in the inputs' dtype, in several orders of summation
    exact: Results  # what it makes in float64

    def judge(self, name: str, actual: Tensor) -> Judgement:
        """The rule for the result of this name."""
        plains = [plain[name] for plain in self.plains]
        return judge_result(name, actual, plains, self.exact[name], gradient=name not in OUTPUTS)

    def check(self, name: str, actual: Tensor) -> None:
        """AssertionError where the result of this name exceeds the rule."""
        self.judge(name, actual).check()


def expect(
    plain: Function,
    inputs: Inputs,
    douts: Sequence[Tensor] = (),
    beside: tuple[str, ...] = (),
    turn: int = 0,
    turns: int = 1,
) -> Expected:
    """What plain(**inputs) gives in the inputs' dtype and in float64, with gradients where there are douts.

    beside: results whose few numbers are no reason to try more orders of summation. turn, turns: see in_orders.
    """
    exact = results(plain, inputs, douts, double=True)
    fewest = min(x.numel() for name, x in exact.items() if name not in beside)
    dtype = next(iter(inputs.values())).dtype
    plains = in_orders(lambda: results(plain, inputs, douts), dtype, fewest, turn, turns)
    return Expected(inputs, list(douts), plains, exact)


def expect_case(case: Case, device: str, dtype: torch.dtype, count: int | None = None) -> list[Expected]:
    """What is expected for each of the draws of the inputs; their number is what judging this dtype takes."""
    count = count or _DRAWS.get(dtype, 1)
    draws = []
    for turn in range(count):
        inputs = draw_inputs(case, dtype, device, seed=turn)
        draws.append(expect(case.plain, inputs, draw_douts(outputs(case.plain, inputs)), (), turn, count))
    return draws


def check_case(case: Case, dtype: torch.dtype, backend: str | None, device: str = "cpu") -> None:
    """AssertionError where the results of a backend, or of the one that is chosen, for one draw exceed the rule."""
    inputs = draw_inputs(case, dtype, device)
    check_operator(functools.partial(case.ours, backend=backend), case.plain, inputs)


def check_case_in_draws(case: Case, dtype: torch.dtype, backend: str | None, draws: int) -> None:
    """`check_case` with the largest errors over several draws: where a result has few numbers."""
    expected = expect_case(case, "cpu", dtype, draws)
    ours = functools.partial(case.ours, backend=backend)
    judge_draws([results(ours, draw.inputs, draw.douts) for draw in expected], expected).check()


def check_operator(ours: Function, plain: Function, inputs: Inputs) -> None:
    """AssertionError where outputs or gradients of `ours` exceed the rule; of inputs that require them."""
    expected = expect(plain, inputs, draw_douts(outputs(plain, inputs)))
    found = results(ours, inputs, expected.douts)
    assert found.keys() == expected.exact.keys(), f"{sorted(found)} instead of {sorted(expected.exact)}"
    for name, actual in found.items():
        expected.check(name, actual)


@torch.no_grad()
def outputs(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """What function(**inputs) returns, as a tuple."""
    out = function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def draw_douts(like: Iterable[Tensor]) -> list[Tensor]:
    """Gradients for outputs such as these: the same numbers on every machine."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in like]


def draw_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Inputs:
    """One draw of a case's inputs, of which those with gradients are differentiated."""
    return leaves(case.inputs(Draw(device, dtype, seed)), case.gradients)


def leaves(inputs: Inputs, gradients: Iterable[str]) -> Inputs:
    """The same tensors, of which those that `gradients` names are differentiated."""
    return {name: x.detach().requires_grad_(name in gradients) for name, x in inputs.items()}


def outputs_and_gradients(
    function: Function, inputs: Inputs, douts: Sequence[Tensor] = (), double: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(outputs of function(**inputs), gradients by the name of each input that requires one and takes part).

    Without douts there are no gradients. double: the inputs are converted to float64.
    """
    own = {
        name: (x.double() if double and x.is_floating_point() else x)
        .detach()
        .requires_grad_(x.requires_grad and len(douts) > 0)
        for name, x in inputs.items()
    }
    out = function(**own)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [name for name, x in own.items() if x.requires_grad]
    found: Sequence[Tensor | None] = ()
    if wanted:
        grad_outs = [dout.to(x.dtype) for dout, x in zip(douts, outs, strict=True)]
        found = torch.autograd.grad(outs, [own[name] for name in wanted], grad_outs, allow_unused=True)
    gradients = {name: x for name, x in zip(wanted, found, strict=True) if x is not None}
    return [x.detach() for x in outs], gradients


def results(
    function: Function, inputs: Inputs, douts: Sequence[Tensor] = (), double: bool = False
) -> Results:
    """Outputs and gradients by name."""
    outs, gradients = outputs_and_gradients(function, inputs, douts, double)
    named = dict(zip(OUTPUTS[: len(outs)], outs, strict=True))
    return named | {f"d{name}": x for name, x in gradients.items()}


def judge_draws(actual: Sequence[Results], expected: Sequence[Expected]) -> Judgement:
    """The result that comes nearest to its allowed error, or exceeds it most; `actual` has one for each draw.

    Of all draws the largest error counts, ours and plain PyTorch's.
    """
    judgements = [
        largest([draw.judge(name, found[name]) for found, draw in zip(actual, expected, strict=True)])
        for name in expected[0].exact
    ]
    failed = [judgement for judgement in judgements if judgement.failure]
    return max(
        failed or judgements, key=lambda j: j.error / j.allowed if j.allowed else math.inf * bool(j.error)
    )


def largest(draws: Sequence[Judgement]) -> Judgement:
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
