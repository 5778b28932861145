"""The error rule's yardstick: every machine's BLAS gives one verdict, and what is wrong in a kernel exceeds it."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pypar.ops.linear import BACKENDS, linear
from pypar.selftest.cases import rms_norm
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import check_case, expect, judge_result, largest_error
from pypar.selftest.orders import InOrder, in_orders

ROWS, OUTPUTS = 96, 64


def operands(K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(K)
    return {
        "x": torch.randn(ROWS, K, generator=generator).to(dtype),
        "weight": torch.randn(OUTPUTS, K, generator=generator).to(dtype),
    }


def judge(K, found, dtype=torch.float32):
    expected = expect(F.linear, operands(K, dtype))
    return expected.judge("out", found)


def chain(x, weight, terms, dtype=torch.float32):
    """x @ weight.T, `terms` of them added up exactly and then, one after the other, in dtype."""
    total = torch.zeros(len(x), len(weight), dtype=dtype)
    for a, b in zip(x.double().split(terms, 1), weight.double().split(terms, 1), strict=True):
        total += (a @ b.T).to(dtype)
    return total


@pytest.mark.parametrize("K", [64, 256, 384, 512, 640, 1024, 4096])
def test_the_products_of_every_blas_keep_the_rule(K):
    """torch's own is MKL or OpenBLAS, numpy's OpenBLAS; oneDNN's is pypar's linear where the machine has it."""
    x, weight = operands(K).values()
    found = {
        "torch": F.linear(x, weight),
        "numpy": torch.from_numpy(x.numpy() @ np.ascontiguousarray(weight.T)),
    }
    if any(backend.unsupported(x, K, K) is None for backend in BACKENDS if backend.name == "onednn"):
        found["onednn"] = linear(x, weight, backend="onednn")
    for name, out in found.items():
        assert judge(K, out).failure is None, name


@pytest.mark.parametrize("K", [2048, 4096, 8192])
def test_a_long_chain_in_fp32_exceeds_the_rule(K):
    assert judge(K, chain(**operands(K), terms=1)).failure is not None
    assert judge(K, chain(**operands(K), terms=K // 128)).failure is None


def test_sums_in_16_bits_exceed_the_rule():
    for dtype in (torch.bfloat16, torch.float16):
        given = operands(512, dtype)
        assert judge(512, F.linear(**given), dtype).failure is None
        assert judge(512, chain(**given, terms=16, dtype=dtype), dtype).failure is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_key_that_is_dropped_exceeds_the_rule(dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (1, 113, 2, 64), "k": (1, 512, 2, 64), "v": (1, 512, 2, 64)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    expected = expect(plain_attention, tensors)
    fewer = {name: x if name == "q" else x[:, :-1] for name, x in tensors.items()}
    for name, whole, part in zip(
        ("out", "lse"), plain_attention(**tensors), plain_attention(**fewer), strict=True
    ):
        expected.check(name, whole)
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            expected.check(name, part)


def test_gradients_are_summed_in_order_too():
    """An error of every thousandth row's gradient, as a forgotten block of keys makes."""
    x, weight = (tensor.requires_grad_() for tensor in operands(1000).values())
    dout = torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(3))
    expected = expect(F.linear, {"x": x, "weight": weight}, [dout])
    dx, dweight = torch.autograd.grad(F.linear(x, weight), [x, weight], dout)
    expected.check("dx", dx)
    expected.check("dweight", dweight)
    dweight[:, 500] -= 0.001 * dout.mean(0)
    with pytest.raises(AssertionError, match="dweight is off by"):
        expected.check("dweight", dweight)


def test_the_yardstick_has_the_same_bits_for_any_number_of_threads_and_any_blas():
    """PyTorch's additions are all that it takes, in 32 bits; BLAS is not called."""
    given = operands(300)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.backends.mkldnn.flags(enabled=count > 1):
                found += in_orders(lambda: F.linear(**given), torch.float32, fewest=1)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 24
    assert all(torch.equal(found[i], found[8 + i]) and torch.equal(found[i], found[16 + i]) for i in range(8))
    assert len({tuple(x.flatten().tolist()) for x in found}) == 8  # each order rounds in another way


def test_sums_and_softmaxes_are_those_of_another_order():
    """The numbers are PyTorch's but for rounding, in their places, whatever the dimension."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 50, 70, generator=generator)
    functions = {
        "sum": lambda x: x.sum((0, 2)),
        "sum of all": lambda x: x.sum(),
        "mean": lambda x: x.mean(1, keepdim=True),
        "softmax": lambda x: x.softmax(1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "logsumexp": lambda x: x.logsumexp(-1),
        "product": lambda x: x @ x.mT,
        "addmm": lambda x: torch.addmm(x[0, 0], x[0], x[1].T @ x[2]),
        "bias": lambda x: F.linear(x, x[0], x[1, :, 0]),
        "nothing": lambda x: x[..., :0] @ x.new_zeros(3, 0, 4),
    }
    for name, function in functions.items():
        found = []
        for order in (None, 0, 1):
            leaf = x.clone().requires_grad_()
            with InOrder(order or 0) if order is not None else torch.enable_grad():
                out = function(leaf)
                out.square().sum().backward()
            found.append((out.detach(), leaf.grad))
        for others in found[1:]:
            for a, b in zip(found[0], others, strict=True):
                assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name


def test_a_case_is_held_to_the_rule_in_its_outputs_and_gradients():
    given = rms_norm.case((7, 63))
    check_case(given, torch.float32, "reference")
    wrong = dataclasses.replace(given, ours=lambda x, weight, backend: 1.0001 * rms_norm.plain(x, weight))
    with pytest.raises(AssertionError, match="out is off by"):
        check_case(wrong, torch.float32, None)
    without_a_row = dataclasses.replace(given, ours=lambda x, weight, backend: _WithoutARow.apply(x, weight))
    with pytest.raises(AssertionError, match="dweight is off by"):
        check_case(without_a_row, torch.float32, None)
    cut_off = dataclasses.replace(given, ours=lambda x, weight, backend: rms_norm.plain(x, weight.detach()))
    with pytest.raises(AssertionError, match=r"\['dx', 'out'\] instead of \['dweight', 'dx', 'out'\]"):
        check_case(cut_off, torch.float32, None)


class _WithoutARow(torch.autograd.Function):
    """rms_norm, whose gradient of weight lacks a row's part."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rms_norm.plain(x, weight)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = rms_norm.plain(leaf, weight)
        (dx,) = torch.autograd.grad(out, leaf, dout)
        return dx, (dout * rms_norm.plain(x, torch.ones_like(weight)))[1:].sum(0)


def test_infinities_and_what_is_missing():
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert largest_error(torch.tensor([1.0, -torch.inf]), exact) == 0
    assert largest_error(torch.tensor([1.0, 3.0]), exact) == torch.inf
    assert largest_error(torch.tensor([torch.nan, -torch.inf]), exact) == torch.inf
    plain = torch.tensor([1.0, -torch.inf])
    assert "instead of" in judge_result("out", plain[:1], [plain], exact).failure
    assert "instead of" in judge_result("out", plain.half(), [plain], exact).failure
    assert judge_result("out", plain, [plain], exact).failure is None


def test_a_large_result_is_computed_in_pieces():
    """Of a batch, of rows, and of one row that is longer than a piece."""
    generator = torch.Generator().manual_seed(2)
    for shapes in (((5, 200, 9), (5, 9, 300)), ((1, 700, 9), (1, 9, 300)), ((2, 1, 300), (2, 300, 70_000))):
        a, b = (torch.randn(shape, generator=generator) for shape in shapes)
        with InOrder(0):
            found = a @ b
        torch.testing.assert_close(found, a @ b, rtol=1e-4, atol=1e-4)


def test_one_order_is_enough_in_16_bits():
    run = functools.partial(torch.ones, 1)
    assert [len(in_orders(run, dtype, n)) for dtype, n in ((torch.bfloat16, 1), (torch.float32, 10**6))] == [
        1,
        2,
    ]
