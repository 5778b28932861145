"""The rule by which every operator is judged: its error may be twice what PyTorch makes in the same dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pypar.ops import native

# With as few rows or columns there are few numbers, in which PyTorch's largest error is a matter of luck: it is then
# the largest of so many calculations that differ in the order of what is summed.
FEW = 3
ORDERS = 8


def farthest(results: list[Tensor], exact: Tensor) -> Tensor:
    """The one with the largest error."""

    def error(x: Tensor) -> float:
        return (x - exact).masked_fill(exact.isinf(), 0).abs().max().item() if x.numel() else 0

    return max(results, key=error)


def assert_accurate(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, *, gradient: bool = False
) -> None:
    """`plain` is PyTorch's result in actual's dtype, `exact` the float64 result for the same inputs.

    A gradient may also lose, twice, what adding and subtracting 0.3 loses: tiny ones are sums of large terms.
    Where `exact` is infinite, actual must be the same: the lse of a row that sees nothing.
    """
    assert actual.dtype == plain.dtype and actual.shape == plain.shape == exact.shape, (
        f"{name}: {actual.dtype} {tuple(actual.shape)}, plain {plain.dtype} {tuple(plain.shape)}, "
        f"exact {tuple(exact.shape)}"
    )
    infinite = exact.isinf()
    if infinite.any():
        assert torch.equal(actual[infinite].double(), exact[infinite]), (
            f"{name} is not infinite where it must be"
        )
        actual, plain, exact = actual[~infinite], plain[~infinite], exact[~infinite]
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if not actual.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    allowed = 2 * plain_error
    if gradient:
        rounded = exact.to(actual.dtype)
        allowed += 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (plain: {plain_error:.3g})"


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
    results = [run_with_gradients(ours, inputs, douts), run_with_gradients(plain, inputs, douts)]
    exact = run_with_gradients(plain, inputs, douts, double=True)
    for i in range(len(douts)):
        assert_accurate(f"output {i}", results[0][0][i], results[1][0][i], exact[0][i])
    assert results[0][1].keys() == exact[1].keys()
    for name, gradient in results[0][1].items():
        assert_accurate(f"gradient of {name}", gradient, results[1][1][name], exact[1][name], gradient=True)


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
