"""linear_cross_entropy by Triton without a GPU: its chunks, a part of the vocabulary, what its kernels move.

Their values by every option: tests/gpu/test_kernel_cases.py.
"""

from unittest.mock import patch

import pytest
import torch

from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from pypar.bench.gpu.moved import count
from pypar.ops.linear_cross_entropy import products
from pypar.ops.linear_cross_entropy.backends import BY_NAME
from pypar.ops.linear_cross_entropy.chunks import LossProblem
from pypar.ops.linear_cross_entropy.loss import TokenWeights, coefficients_of_loss
from pypar.ops.linear_cross_entropy.passes import differentiate_all, measure_and_differentiate
from pypar.ops.linear_cross_entropy.rows import Block
from pypar.selftest.cases.linear_cross_entropy import kernel_cases
from pypar.selftest.row_kernels import launches_of
from tests.ops.linear_cross_entropy.inputs import make, numbers

WORDS = 131


def chunked(name: str, dtype: torch.dtype, chunk_rows: int) -> list[torch.Tensor]:
    """Statistics and gradients of ten tokens, found while the logits are there and once more."""
    hidden, weight, target = make(10, 16, WORDS, dtype)
    operands = (hidden.detach(), weight.detach(), numbers(WORDS, seed=3), target)
    problem = LossProblem(*operands, None, 3.0, BY_NAME[name], chunk_rows, needs_sum=True)
    needs = (True, True, True)
    coefficients = coefficients_of_loss(TokenWeights(torch.ones(10), torch.tensor(10.0)), 0.1, 0.01, WORDS)
    state, found = measure_and_differentiate(problem, None, coefficients, needs)
    again = differentiate_all(problem, None, coefficients, state, needs)
    return [state, *vars(found).values(), *vars(again).values()]


def check_chunks(dtype: torch.dtype) -> None:
    """Three chunks, whose parts of the weight's gradient are added slab by slab, against one of the definition."""
    expected = chunked("reference", dtype, 64)
    with patch.object(products, "_SLAB_BYTES", 50 * 16 * 4):
        found = chunked("triton", dtype, 4)
    assert all(torch.equal(x, y) for x, y in zip(found[1:4], found[4:], strict=True))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1:], expected[1:], rtol=rtol, atol=rtol / 1000)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_chunks_add_up(interpreter, dtype):
    interpreter.call(check_chunks, dtype)


def check_parts_of_a_vocabulary() -> None:
    """The statistics of two parts: targets of the other part count nowhere, also where a block ends with no words."""
    logits, targets = numbers(6, WORDS), torch.tensor([0, 59, 60, 64, 130, 70])
    states = []
    for begin, end in ((0, 60), (60, WORDS)):
        part, state = logits[:, begin:end].contiguous(), torch.zeros(4, 6)
        BY_NAME["triton"].statistics(Block(part, None, targets - begin, 0.0), state, True)
        states.append(state)
    (most, totals, picked, sums) = torch.stack(states).unbind(1)
    lse = (most + totals.log()).logsumexp(0)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(picked.sum(0), logits[torch.arange(6), targets])
    torch.testing.assert_close(sums.sum(0), logits.sum(-1))


def test_parts_of_a_vocabulary(interpreter):
    interpreter.call(check_parts_of_a_vocabulary)


def moved_logits(number: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """Of each launch: (elements of the logits, the most loads and the most stores of one, loads and stores of all)."""
    found = []
    for launch in sum(launches_of(kernel_cases()[number], dtype), []):
        logits = next(x for x in count([launch]) if x.name == "logits_ptr")
        found.append((logits.num_elements, logits.most_loads, logits.most_stores, logits.num_moved))
    return found


def test_logits_are_moved_once_each_way(interpreter):
    """Read for the statistics, and written where bias or softcap changes them; read and written for the gradient."""
    for number, size, stored in ((3, 7 * 63, 0), (0, 3 * 4200, 1)):
        found = interpreter.call(moved_logits, number, torch.float32)
        assert found == [(size, 1, stored, size * (1 + stored)), (size, 1, 1, 2 * size)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bits_are_those_of_fp32(dtype):
    """Sums too, slab by slab; and torch takes the call that GPUs get."""
    a, b = numbers(70, 33).to(dtype), numbers(9, 33, seed=1).to(dtype)
    exact = a.double() @ b.double().t()
    out = torch.empty(70, 9)
    products.multiply_kept_into(out, a, b)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    with patch.object(products, "_SLAB_BYTES", 9 * 4 * 32):
        products.multiply_kept_into(out, a.t().contiguous().t(), b, add=True)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-6, atol=1e-6)
    products.multiply_kept_into(out.to("meta"), a.to("meta"), b.to("meta"), add=True)
