"""Operators of torch by Triton's kernels: schema, shapes, autograd and tracing, in Triton's interpreter."""

import pytest
import torch

from pypar.ops.adamw import Update
from pypar.ops.adamw.arguments import problem_of
from pypar.ops.backend import op_modules
from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

OPS = torch.ops.pypar


def check_cross_entropy() -> None:
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 3, -100, 6, 1])
    torch.library.opcheck(OPS.cross_entropy_forward, (logits, targets, -100, "triton"))


def check_bucket() -> None:
    op_modules()  # defines all operators
    out = torch.empty(63, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.bucket_forward, (torch.randn(63), 0.5, out, "triton"))


def check_linear_cross_entropy() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    inputs = (hidden, weight, None, torch.tensor([0, 3, -100, 6, 1]))
    torch.library.opcheck(OPS.linear_cross_entropy_forward, (*inputs, -100, 0.0, True, "triton"))
    options = (-100, 2.0, 0.1, 0.01, [True, True, False], "triton")
    arguments = (*inputs, torch.ones(5), torch.tensor(5.0), *options)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.linear_cross_entropy_with_gradients, arguments, test_utils=checks)


def check_adamw() -> None:
    columns = ([torch.randn(40)], [torch.randn(40)], [torch.zeros(40)], [torch.zeros(40)])
    problem = problem_of(*columns, Update(step=1, lr=1e-3), None, 1.0, None, None)
    torch.library.opcheck(OPS.adamw_update, (*problem, "triton"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [check_cross_entropy, check_bucket, check_linear_cross_entropy, check_adamw],
    ids=lambda f: f.__name__,
)
def test_opcheck(interpreter, check):
    interpreter.call(check)
