"""cross_entropy on every backend of a CPU; Triton's kernels: tests/gpu/test_row_kernels.py.

The long tests have every combination, the quick ones every pair.
"""

import functools
import math

import pytest
import torch

from pypar.ops.cross_entropy import cross_entropy
from pypar.selftest.cases.cross_entropy import case
from pypar.selftest.judge import check_case, draw_inputs
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.harness.pairs import pairwise

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, strided=False):
    return draw_inputs(case(shape, ignored=True, strided=strided), dtype)


@pytest.mark.parametrize(
    ("strided", "shape", "dtype", "name"),
    pairwise([False, True], [(63, 2), (2, 63, 111), (7, 1023), (3, 5003)], DTYPES, NAMES),
)
def test_accuracy(name, dtype, shape, strided):
    check_case(case(shape, ignored=True, strided=strided), dtype, name)


@pytest.mark.parametrize("name", NAMES)
def test_one_word_is_certain(name):
    inputs = make((7, 1), torch.float32)
    loss = cross_entropy(**inputs, backend=name)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(7)) and torch.equal(inputs["logits"].grad, torch.zeros(7, 1))


@pytest.mark.parametrize("name", NAMES)
def test_large_and_masked_logits(name):
    """Sizes beyond what exp can hold, and -inf for words that are ruled out, also over a cache block."""
    logits = torch.full((3, 5000), -math.inf)
    logits[0, 4999] = 5.0
    logits[1, :] = 3e4
    logits[2, 17], logits[2, 4000] = -1e30, -1e30
    targets = torch.tensor([4999, 7, 17])
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, backend=name)
    assert torch.allclose(loss, torch.tensor([0.0, math.log(5000), math.log(2)]), rtol=1e-5)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_ignored_tokens_take_no_part(name):
    """Not even when their logits are NaN."""
    logits = torch.randn(4, 9)
    logits[1] = math.nan
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 3, 3, 8]), ignore_index=3, backend=name)
    loss.sum().backward()
    assert torch.equal(loss[1:3], torch.zeros(2)) and torch.equal(logits.grad[1:3], torch.zeros(2, 9))
    assert torch.isfinite(logits.grad).all() and loss[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name):
    logits = torch.randn(1, 100)
    logits[0, 50] = math.nan
    assert cross_entropy(logits, torch.tensor([3]), backend=name).isnan().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(name, shape):
    inputs = make(shape, torch.float32)
    loss = cross_entropy(**inputs, backend=name)
    loss.sum().backward()
    assert loss.shape == shape[:-1] and inputs["logits"].grad.shape == shape


def test_same_bits_for_any_number_of_threads():
    assert_same_for_any_threads(
        functools.partial(cross_entropy, backend="native"), make((1023, 111), torch.float32)
    )


def test_gradient_of_the_reference():
    inputs = make((3, 4, 7), torch.float64)
    torch.autograd.gradcheck(cross_entropy, tuple(inputs.values()))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    inputs = make((5, 7), torch.float32, strided=True)
    torch.library.opcheck(torch.ops.pypar.cross_entropy_forward, (*inputs.values(), -100, name))
    logits, targets = inputs["logits"].detach(), inputs["targets"]
    args = (torch.rand(5), logits, targets, logits.amax(-1), 1 + torch.rand(5), -100, name)
    torch.library.opcheck(torch.ops.pypar.cross_entropy_backward, args)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_for_a_part_of_a_vocabulary(name):
    """The maximum and total that backward takes may be those of more words than these logits hold."""
    inputs = make((2, 5, 7), torch.float32)
    logits, targets = inputs["logits"].detach(), inputs["targets"]
    loss, maximum, total = torch.ops.pypar.cross_entropy_forward(logits, targets, -100, name)
    counted = targets != -100
    assert torch.equal(loss, cross_entropy(logits, targets, backend=name))
    assert torch.allclose((maximum + total.log())[counted], logits.logsumexp(-1)[counted])
    args = (loss, logits, targets, maximum + 1, total * 2, -100, name)
    dlogits = torch.ops.pypar.cross_entropy_backward(*args)
    share = (logits - maximum.unsqueeze(-1) - 1).exp() / (2 * total.unsqueeze(-1))
    expected = share - torch.nn.functional.one_hot(targets.clamp(min=0), 7)
    assert torch.allclose(dlogits[counted], (expected * loss.unsqueeze(-1))[counted], atol=1e-6)


def test_compiles_as_one_graph():
    inputs = make((5, 63), torch.float32)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), cross_entropy(**inputs))
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (torch.zeros(4, dtype=torch.int64), "targets .* must have the shape of logits"),
        (torch.zeros(3, dtype=torch.int32), "targets is torch.int32 and must be int64"),
        (torch.tensor([0, 4, -1]), r"targets contains 4, outside of \[0, 4\) and not ignore_index"),
        (torch.tensor([0, -1, 9]), r"targets contains -1, outside of \[0, 4\)"),
    ],
)
def test_bad_input_is_named(name, targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        cross_entropy(torch.zeros(3, 4), targets, backend=name)
