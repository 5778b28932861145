"""linear_cross_entropy as an operator of torch: autograd, compilation, memory, threads, refusals."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pypar
from pypar.ops import linear_cross_entropy
from pypar.ops.linear_cross_entropy import BACKENDS
from pypar.ops.linear_cross_entropy.rows import Block, Coefficients
from tests.harness.native_kernels import assert_same_for_any_threads
from tests.ops.linear_cross_entropy.inputs import make, numbers

NAMES = ["native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.pypar


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_part_has_no_gradient(name, reduction):
    hidden, weight, target = make()
    whole = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=name)
    both = torch.autograd.grad(whole.sum(), (hidden, weight))
    for frozen in (0, 1):
        inputs = [hidden, weight]
        inputs[frozen] = inputs[frozen].detach()
        loss = linear_cross_entropy(*inputs, target, reduction=reduction, backend=name)
        (gradient,) = torch.autograd.grad(loss.sum(), inputs[1 - frozen])
        torch.testing.assert_close(gradient, both[1 - frozen])
    with torch.no_grad():
        assert torch.equal(
            linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=name), whole
        )
    for needs in ([True, False, False], [False, True, False]):
        arguments = (
            hidden,
            weight,
            None,
            target,
            torch.ones(130),
            torch.ones(()),
            -100,
            0.0,
            0.0,
            0.0,
            needs,
            name,
        )
        sizes = [x.numel() for x in OPS.linear_cross_entropy_with_gradients(*arguments)[5:]]
        assert sizes == [hidden.numel() * needs[0], weight.numel() * needs[1], 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_second_backward_gives_the_same(name, dtype):
    hidden, weight, target = make(dtype=dtype)
    target[::7] = -100
    loss = linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, z_loss=0.01, backend=name)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    saved = [x.clone() for x in first]
    first[1].zero_()  # as an optimizer might
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(6.0))
    for a, b in zip(saved, second, strict=True):
        torch.testing.assert_close(
            2 * a.float(), b.float(), rtol=0.02 if dtype != torch.float32 else 1e-4, atol=1e-5
        )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    hidden, weight, target = make()
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiate once"):
        dhidden.square().sum().backward()


def test_gradient_of_token_weights():
    hidden, weight, target = make()
    weights = torch.rand(130, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, target, token_weights=weights)
    found = torch.autograd.grad(loss, (weights, hidden))
    each = F.cross_entropy(F.linear(hidden, weight), target, reduction="none")
    expected = torch.autograd.grad((each * weights).sum() / weights.sum(), (weights, hidden))
    torch.testing.assert_close(found, expected)


def test_memory_is_that_of_a_chunk():
    """Of logits that would take 256 MiB."""
    hidden, weight, target = make(8192, 16, 8192)

    def run():
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))

    torch.autograd.grad(linear_cross_entropy(hidden[:9], weight, target[:9]), weight)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kib("VmRSS")
    run()
    assert (_kib("VmHWM") - before) << 10 < 8192 * 8192 * 4 // 8


def _kib(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_same_bits_of_rows_for_any_number_of_threads():
    """The products are torch's, whose bits may depend on its threads."""
    logits, target = numbers(64, 3001), torch.arange(64)
    ones = torch.ones(64)

    def rows(logits):
        statistics, gradient, state = logits.detach().clone(), logits.detach().clone(), torch.zeros(4, 64)
        BACKENDS[0].statistics(Block(statistics, None, target, 3.0), state, True)
        coefficients = Coefficients(state[0], ones / state[1], -ones, None)
        BACKENDS[0].gradient(Block(gradient, None, target, 3.0), coefficients, True, torch.float32)
        return torch.cat((state.T, gradient), 1) + logits.sum() * 0

    assert_same_for_any_threads(rows, {"logits": logits.requires_grad_()})


QUICK_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "checks",
    [QUICK_CHECKS, pytest.param(("test_aot_dispatch_dynamic",), marks=pytest.mark.slow)],
    ids=["quick", "aot"],
)
def test_opcheck(name, checks):
    hidden, weight, target = make(9, 16, 21)
    bias, ones = numbers(21, seed=3).requires_grad_(), torch.ones(9)
    plain = [hidden, weight, bias, target]
    torch.library.opcheck(
        OPS.linear_cross_entropy_forward, (*plain, -100, 0.0, True, name), test_utils=checks
    )
    flags = [True, True, True]
    arguments = (*plain, ones, ones[0], -100, 2.0, 0.1, 0.01, flags, name)
    torch.library.opcheck(OPS.linear_cross_entropy_with_gradients, arguments, test_utils=checks)
    inputs = [x.detach() for x in plain]
    total, _, _, maximum = OPS.linear_cross_entropy_forward(*inputs, -100, 0.0, True, name)
    arguments = (ones, ones, ones, *inputs, total, maximum, -100, 0.0, True, flags, name)
    torch.library.opcheck(OPS.linear_cross_entropy_backward, arguments, test_utils=checks)
    gradients = OPS.linear_cross_entropy_with_gradients(
        *inputs, ones, ones[0], -100, 0.0, 0.0, 0.0, flags, name
    )[5:]
    torch.library.opcheck(OPS.linear_cross_entropy_scaled, (torch.tensor(2.0), *gradients), test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    hidden, weight, target = make(70)

    def loss(hidden, weight, target):
        return linear_cross_entropy(hidden * 2, weight, target, reduction=reduction, z_loss=0.1).sum() * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))
    found = torch.autograd.grad(compiled(hidden, weight, target), (hidden, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden \(3, 5\) must be \[..., H\] and weight \(7, 4\)"),
        ({"hidden": torch.zeros(3, 4).bfloat16()}, "must have one floating-point dtype"),
        ({"weight": torch.zeros(0, 4)}, "weight has no rows"),
        ({"bias": torch.zeros(6)}, r"bias \(6,\) torch.float32 must be \[V\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "targets .* must have the shape of hidden"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "must be int64"),
        ({"target": torch.tensor([0, 7, -1])}, r"targets contains 7, outside of \[0, 7\)"),
        ({"token_weights": torch.zeros(4)}, "token_weights .* must have the shape of target"),
        ({"reduction": "max"}, "reduction is 'max' and must be one of mean, sum, none"),
        ({"label_smoothing": 1.5}, r"label_smoothing \(1.5\) must lie in \[0, 1\]"),
        ({"softcap": 0.0}, r"softcap \(0.0\) must be greater than 0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_bad_input_is_named(change, sentence):
    given = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=sentence):
        pypar.linear_cross_entropy(**(given | change))
