"""adamw's moments in 8 bits: codes, their values, and training with them."""

import pytest
import torch

from pypar.ops.adamw import Blocks, Update, adamw, from_blocks, to_blocks, zero_blocks
from pypar.ops.adamw.blocks import lines, values
from pypar.selftest.cases import adamw as cases


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_is_at_most_half_an_interval_from_its_value(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400 * 256, generator=generator) * 10 ** torch.randn(400 * 256, generator=generator).mul(2)
    x = x if signed else x.square()
    codes, absmax = to_blocks(x, signed=signed)
    part = x / absmax.repeat_interleave(256)
    first = 0 if signed else 1
    halves = [0.45 * 10.0 ** (d - 6) / 2 ** (d + first) for d in range(7) for _ in range(2 ** (d + first))]
    below = halves[::-1] if signed else []
    # What is not 0 is at least 1e-7; a second moment below that becomes the least value.
    widths = torch.tensor([*below, 1e-7, *halves, 0.0])
    error = (part - values(signed)[codes.long()]).abs()
    near = error <= widths[codes.long()] * 1.0001 + 1e-7
    assert (near | ((codes == 1) & (not signed))).all()
    assert len(codes.unique()) > 200
    assert torch.equal(from_blocks(Blocks(codes, absmax), signed=signed)[codes == 255], x[codes == 255])


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_keeps_its_code(signed):
    table = values(signed)
    codes = to_blocks(table, signed=signed).codes
    assert torch.equal(codes.int(), torch.arange(256, dtype=torch.int32))
    assert lines(signed).shape == (2, 7)


def test_a_second_moment_that_is_not_zero_stays_so():
    v = torch.tensor([1.0, 1e-12, 0.0])
    codes = to_blocks(v, signed=False).codes
    assert codes.tolist() == [255, 1, 0]


def test_training_in_8_bits_follows_fp32():
    """Least squares: after 60 updates the loss is within a tenth of what moments in fp32 give."""
    losses = []
    for form in (cases.PLAIN, cases.EIGHT_BITS):
        generator = torch.Generator().manual_seed(0)
        x, target = torch.randn(200, 64, generator=generator), torch.randn(200, 80, generator=generator)
        weight = torch.zeros(64 * 80)
        moments = (
            [[zero_blocks(weight, signed=True)], [zero_blocks(weight, signed=False)]]
            if form is cases.EIGHT_BITS
            else [[torch.zeros_like(weight)], [torch.zeros_like(weight)]]
        )
        for step in range(1, 61):
            error = x @ weight.view(64, 80) - target
            gradient = (x.T @ error / 200).flatten()
            adamw([weight], [gradient], *moments, Update(step, 2e-2, weight_decay=0.0))
        losses.append(error.square().mean().item())
    start = target.square().mean().item()
    assert losses[0] < 0.85 * start and losses[1] < losses[0] + 0.1 * (start - losses[0])
