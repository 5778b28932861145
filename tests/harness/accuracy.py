"""The rule by which every operator is judged: its error may be twice what PyTorch makes in the same dtype.

pypar.selftest.check has the rule, pypar.selftest.orders what PyTorch makes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops import native
from pypar.selftest.check import judge_result
from pypar.selftest.orders import in_orders


@dataclass(frozen=True)
class Expected:
    """By name (output 0, output 1, ..., and of gradients the input's): plain PyTorch's results, float64's."""

    plains: list[dict[str, Tensor]]
    exact: dict[str, Tensor]

    def check(self, name: str, actual: Tensor, *, gradient: bool = False) -> None:
        assert_accurate(
            name, actual, [plain[name] for plain in self.plains], self.exact[name], gradient=gradient
        )


def expect(
    plain: Callable,
    inputs: dict[str, Tensor],
    douts: list[Tensor] | None = None,
    beside: tuple[str, ...] = (),
) -> Expected:
    """What plain(**inputs) gives in the inputs' dtype, in several orders of summation, and in float64.

    beside: results whose few numbers are no reason to try more orders.
    """

    def run(double: bool) -> dict[str, Tensor]:
        outputs, gradients = run_with_gradients(plain, inputs, douts, double)
        return {f"output {i}": out for i, out in enumerate(outputs)} | gradients

    exact = run(double=True)
    fewest = min(x.numel() for name, x in exact.items() if name not in beside)
    return Expected(in_orders(lambda: run(False), next(iter(inputs.values())).dtype, fewest), exact)


def assert_accurate(
    name: str,
    actual: Tensor,
    plains: list[Tensor],
    exact: Tensor,
    *,
    gradient: bool = False,
    plain_exact: Tensor | None = None,
) -> None:
    """`plains` are PyTorch's results in actual's dtype, `exact` the float64 result for the same inputs."""
    judgement = judge_result(name, actual, plains, exact, gradient=gradient, plain_exact=plain_exact)
    assert judgement.failure is None, judgement.failure


def run_with_gradients(
    function: Callable, inputs: dict[str, Tensor], douts: list[Tensor] | None, double: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(outputs, gradient of each input that requires one)."""
    leaves = {}
    for name, x in inputs.items():
        x = x.detach()
        if double and x.is_floating_point():
            x = x.double()
        leaves[name] = x.requires_grad_(inputs[name].requires_grad)
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if douts is not None:
        torch.autograd.backward(
            outputs, [dout.to(out.dtype) for dout, out in zip(douts, outputs, strict=True)]
        )
    return [out.detach() for out in outputs], {n: x.grad for n, x in leaves.items() if x.grad is not None}


def check_operator(ours: Callable, plain: Callable, inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients of `ours` against `plain` in the inputs' dtype and in float64."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(out.shape, out.dtype) for out in run_with_gradients(ours, inputs, None)[0]]
    douts = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes]
    outputs, gradients = run_with_gradients(ours, inputs, douts)
    expected = expect(plain, inputs, douts)
    for i, out in enumerate(outputs):
        expected.check(f"output {i}", out)
    assert gradients.keys() == {name for name, x in inputs.items() if x.requires_grad}
    for name, gradient in gradients.items():
        expected.check(name, gradient, gradient=True)


def assert_same_for_any_threads(function: Callable, inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients are bitwise equal for 1, 2 and 3 threads, and from run to run."""
    outputs = run_with_gradients(function, inputs, None)[0]
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            outputs, gradients = run_with_gradients(function, inputs, douts)
            results.append([*outputs, *gradients.values()])
    finally:
        torch.set_num_threads(num_threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Native kernels run with this instruction set inside."""
    module = native.module()
    before = module.selected_isa()
    module.select_isa(name)
    try:
        yield
    finally:
        module.select_isa(before)
