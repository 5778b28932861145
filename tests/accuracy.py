"""The rule by which every operator is judged: its error may be twice what PyTorch makes in the same dtype."""

import torch
from torch import Tensor


def assert_accurate(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, *, gradient: bool = False
) -> None:
    """`plain` is PyTorch's result in actual's dtype, `exact` the float64 result for the same inputs.

    A gradient may also lose what adding and subtracting 0.3 loses twice, since tiny ones are sums of large
    terms.
    """
    assert actual.dtype == plain.dtype and actual.shape == plain.shape == exact.shape, (
        f"{name}: {actual.dtype} {tuple(actual.shape)}, plain {plain.dtype} {tuple(plain.shape)}, "
        f"exact {tuple(exact.shape)}"
    )
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if not actual.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    allowed = 2 * plain_error
    if gradient:
        rounded = exact.to(actual.dtype)
        allowed += 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    assert error <= allowed, (
        f"{name}: error {error:.3g}, allowed {allowed:.3g} (plain PyTorch's {plain_error:.3g})"
    )
