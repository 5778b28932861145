"""The values of linear_cross_entropy on every backend, in one process."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pypar.ops import linear_cross_entropy, native
from pypar.ops.linear_cross_entropy import BACKENDS
from pypar.ops.linear_cross_entropy.chunks import LossProblem, rows_of_a_chunk
from pypar.ops.linear_cross_entropy.loss import TokenWeights, coefficients_of_loss
from pypar.ops.linear_cross_entropy.passes import differentiate_all, measure_and_differentiate
from pypar.selftest.cases.linear_cross_entropy import OPTIONS, case
from pypar.selftest.judge import check_case
from tests.harness.native_kernels import instruction_set
from tests.ops.linear_cross_entropy.inputs import make, numbers

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.pypar


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_accuracy(name, dtype, options):
    """Three chunks, the last one of one token; words that divide nothing."""
    check_case(case((129,), 31, 301, options, bias=True, weighted=True, ignored=True), dtype, name)
    check_case(case((1, 65), 16, 67, options), dtype, name)


@pytest.mark.parametrize("isa", native.module().supported_isas())
def test_every_instruction_set(isa):
    with instruction_set(isa):
        for options in ("smoothing and z-loss", "softcap"):
            check_case(case((67,), 16, 2111, options, bias=True), torch.float32, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_several_blocks(dtype):
    """Three blocks of uneven length, in which every quantity of a row goes on."""
    hidden, weight, target = make(130, 16, 1001, dtype)
    bias, needs = numbers(1001, seed=3), (True, True, True)
    weights = TokenWeights(torch.ones(130), torch.tensor(130.0))
    found = []
    for block_bytes in (None, 400 * 16 * 4):
        backend = replace(BACKENDS[0], block_bytes=block_bytes)
        problem = LossProblem(hidden.detach(), weight.detach(), bias, target, None, 3.0, backend, 64, True)
        state, gradients = measure_and_differentiate(
            problem, None, coefficients_of_loss(weights, 0.1, 0.01, 1001), needs
        )
        again = differentiate_all(problem, None, coefficients_of_loss(weights, 0.1, 0.01, 1001), state, needs)
        found.append((state, *vars(gradients).values(), *vars(again).values()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)


def test_rows_of_a_chunk():
    assert rows_of_a_chunk(8192, 1024, 32768, (64, 512)) == 256
    assert rows_of_a_chunk(10, 1024, 32768, (64, 512)) == 64
    assert rows_of_a_chunk(1 << 20, 4096, 1000, (64, 512)) == 512
    assert rows_of_a_chunk(0, 0, 1, (64, 512)) == 64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(name, reduction):
    hidden, weight, _ = make(70)
    with torch.no_grad():
        hidden.fill_(math.nan)
    bias = torch.zeros(77, requires_grad=True)
    target = torch.full((70,), -100)
    loss = linear_cross_entropy(
        hidden, weight, target, bias=bias, reduction=reduction, label_smoothing=0.1, z_loss=1.0, backend=name
    )
    loss.sum().backward()
    for x in (loss, hidden.grad, weight.grad, bias.grad):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_take_no_part(name, reduction):
    """Not even when their hidden state is NaN, or their upstream gradient."""
    hidden, weight, target = make(5)
    with torch.no_grad():
        hidden[1], hidden[3] = math.nan, math.inf
    target[1] = target[3] = 7
    found = linear_cross_entropy(
        hidden, weight, target, ignore_index=7, reduction=reduction, return_lse=True, return_logprob=True,
        backend=name,
    )  # fmt: skip
    found[0].sum().backward()
    assert all(x.isfinite().all() for x in (*found, hidden.grad, weight.grad))
    for x in (*found[1:], hidden.grad):
        assert torch.equal(x[[1, 3]], torch.zeros_like(x[[1, 3]]))
    kept = [0, 2, 4]
    expected = F.cross_entropy(F.linear(hidden[kept], weight), target[kept], reduction=reduction)
    torch.testing.assert_close(found[0] if reduction == "mean" else found[0][kept], expected)


@pytest.mark.parametrize("name", NAMES)
def test_empty(name):
    hidden, weight, target = make(0)
    loss = linear_cross_entropy(hidden, weight, target, backend=name)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 16) and not weight.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_lse_and_logprob(name):
    hidden, weight, target = make()
    loss, lse, logprob = linear_cross_entropy(
        hidden, weight, target, return_lse=True, return_logprob=True, backend=name
    )
    logits = F.linear(hidden.detach(), weight.detach())
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(-1, target[:, None])[:, 0])
    torch.testing.assert_close(loss, -logprob.mean())
    assert loss.requires_grad and not lse.requires_grad and not logprob.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_large_and_masked_logits(name):
    """Logits beyond what exp can hold, and words that a bias rules out, at either end of the vocabulary."""
    hidden, weight, target = make(words=5003)
    bias = torch.zeros(5003)
    bias[:2500] = bias[4999:] = -math.inf
    target = target % 2499 + 2500
    scale = 1e3
    loss = linear_cross_entropy(hidden * scale, weight, target, bias=bias, reduction="none", backend=name)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    logits = F.linear(hidden.detach().double() * scale, weight.detach().double())[:, 2500:4999]
    expected = F.cross_entropy(logits, target - 2500, reduction="none")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    assert dhidden.isfinite().all() and not dweight[:2500].any() and not dweight[4999:].any()


def test_nan_is_not_hidden():
    hidden, weight, target = make()
    with torch.no_grad():
        hidden[5, 3] = math.nan
    for name in NAMES:
        assert linear_cross_entropy(hidden, weight, target, backend=name).isnan()


@pytest.mark.parametrize("tokens", [1024, pytest.param(65536, marks=pytest.mark.slow)])
def test_the_loss_of_bf16_is_that_of_fp64(tokens):
    """A running loss in bf16 would be 8 % off at 8,192 tokens."""
    hidden, weight, target = make(tokens, 8, 509, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, target)
    exact = F.cross_entropy(F.linear(hidden.double(), weight.double()), target)
    assert abs(loss.double() - exact) <= 1e-5 * exact


def test_the_weight_gradient_of_many_chunks_is_summed_in_fp32():
    """In bf16 the sum over chunks would lose what each adds: 64 chunks of equal parts."""
    hidden, weight, target = make(64, 8, 13, torch.bfloat16)
    one = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, reduction="sum"), weight)[0]
    many = hidden.detach().repeat(256, 1)
    loss = linear_cross_entropy(many, weight, target.repeat(256), reduction="sum")
    (dweight,) = torch.autograd.grad(loss, weight)
    assert ((dweight.double() / 256 - one.double()).abs() <= 0.008 * one.double().abs()).all()
