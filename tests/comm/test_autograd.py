"""Differentiable collectives against their definition on one process: values, gradients, second gradients.

The long tests have every combination, the quick ones every pair.
"""

import pytest
import torch
import torch.distributed as dist

from pypar.comm import copy_to, gather_from, gather_replicated, reduce_from, reduce_scatter_to, split_to
from pypar.mesh import Axis
from tests.harness.pairs import pairwise

WORLD_SIZES = [1, 2, 4]
DTYPES = [torch.float32, torch.bfloat16]


def _axis():
    return Axis.of(dist.group.WORLD, "world")


def _whole_numbers(seed, shape, dtype):
    return torch.randint(-4, 5, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


# What each function means: from the list of all ranks' inputs to the list of all ranks' outputs.
def _define_copy(inputs, dim):
    return [x * 1 for x in inputs]


def _define_reduce(inputs, dim):
    return [sum(inputs) for _ in inputs]


def _define_gather(inputs, dim):
    return [torch.cat(inputs, dim) for _ in inputs]


def _define_reduce_scatter(inputs, dim):
    return list(sum(inputs).chunk(len(inputs), dim))


def _define_split(inputs, dim):
    return [x.chunk(len(inputs), dim)[rank] for rank, x in enumerate(inputs)]


def _expected(define, replicated_input, replicated_output, inputs, douts, dim):
    """Outputs and input gradients of all ranks by plain autograd on one process.

    An input that is the same on every rank is one tensor here, so its gradient is the sum over the ranks'
    uses. An output that is the same on every rank is used once.
    """
    leaves = [x.clone().float().requires_grad_() for x in inputs]
    if replicated_input:
        leaves = [leaves[0]] * len(inputs)
    outputs = define(leaves, dim)
    used = 1 if replicated_output else len(outputs)
    loss = sum((out * dout.float()).sum() for out, dout in zip(outputs[:used], douts[:used], strict=True))
    gradients = torch.autograd.grad(loss, leaves[:1] if replicated_input else leaves)
    gradients = list(gradients) * (len(inputs) if replicated_input else 1)
    return [out.detach() for out in outputs], gradients


# function, its definition, whether its input and its output are the same on every rank
CASES = {
    "copy_to": (lambda x, axis, dim: copy_to(x, axis), _define_copy, True, False),
    "reduce_from": (lambda x, axis, dim: reduce_from(x, axis), _define_reduce, False, True),
    "gather_from": (gather_from, _define_gather, False, False),
    "reduce_scatter_to": (reduce_scatter_to, _define_reduce_scatter, False, False),
    "split_to": (split_to, _define_split, True, False),
    "gather_replicated": (gather_replicated, _define_gather, False, True),
}


def _check(name, shape, dim, dtype):
    axis = _axis()
    function, define, replicated_input, replicated_output = CASES[name]
    shape = list(shape)
    if name in ("reduce_scatter_to", "split_to"):
        shape[dim] *= axis.size
    inputs = [_whole_numbers(0 if replicated_input else r, shape, dtype) for r in range(axis.size)]
    out_shape = define(inputs, dim)[0].shape
    douts = [
        _whole_numbers(100 + (0 if replicated_output else r), out_shape, dtype) for r in range(axis.size)
    ]
    outputs, gradients = _expected(define, replicated_input, replicated_output, inputs, douts, dim)

    x = inputs[axis.rank].clone().requires_grad_()
    out = function(x, axis, dim)
    dout = douts[axis.rank].clone()
    (dx,) = torch.autograd.grad(out, x, dout)
    assert out.dtype == dx.dtype == dtype
    assert torch.equal(out.float(), outputs[axis.rank])
    assert torch.equal(dx.float(), gradients[axis.rank])
    assert torch.equal(x, inputs[axis.rank]), "the input was written"
    assert torch.equal(dout, douts[axis.rank]), "the incoming gradient was written"


@pytest.mark.parametrize(("dtype", "world_size", "name"), pairwise(DTYPES, WORLD_SIZES, CASES))
def test_values_and_gradients(ranks, name, world_size, dtype):
    for shape, dim in [((3, 5), 0), ((3, 5), -1), ((2, 7, 3), 1), ((1, 63, 5), 1), ((111,), 0)]:
        ranks(world_size, _check, name, shape, dim, dtype)


def _shared_gradient(name):
    """y = x + f(x): the sum hands one gradient tensor to both branches."""
    axis = _axis()
    function = CASES[name][0]
    x = torch.full((4, 4), 1.0).requires_grad_()
    other = torch.zeros(4, 4).requires_grad_()
    (other + function(x, axis, 0)).sum().backward()
    return other.grad, x.grad


@pytest.mark.parametrize("name", ["copy_to", "reduce_from"])
def test_gradient_shared_with_another_branch_is_not_written(ranks, name):
    for other, x in ranks(2, _shared_gradient, name):
        assert torch.equal(other, torch.ones(4, 4))
        assert torch.equal(x, torch.full((4, 4), 2.0 if name == "copy_to" else 1.0))


def _expanded_gradient():
    axis = _axis()
    x = torch.ones(3, 4, requires_grad=True)
    copy_to(x, axis).sum().backward()  # sum's gradient is one number with strides 0
    return x.grad


def test_expanded_gradient_is_reduced_once(ranks):
    assert all(torch.equal(dx, torch.full((3, 4), 2.0)) for dx in ranks(2, _expanded_gradient))


def _second_gradient(name):
    """d/dx of (dx . v)^2 / 2, with dx = the gradient of sum(f(x)^3): runs each backward's own backward."""
    axis = _axis()
    function = CASES[name][0]
    shape = (4 * axis.size, 3) if name in ("reduce_scatter_to", "split_to") else (4, 3)
    x = torch.full(shape, 0.5, dtype=torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(function(x, axis, 0).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    return ddx


# On two ranks with x = 0.5. The first gradient is 3 f^2 and its derivative 6 f, where f = 0.5, or 1 where f
# sums two ranks. It is counted twice where two ranks' gradients depend on this rank's x.
@pytest.mark.parametrize(
    ("name", "row_sum"),
    [
        ("copy_to", 2 * 3.0),
        ("reduce_from", 2 * 6.0),
        ("gather_from", 2 * 3.0),
        ("reduce_scatter_to", 2 * 6.0),
        ("split_to", 3.0),
        ("gather_replicated", 3.0),
    ],
)
def test_second_gradients(ranks, name, row_sum):
    for ddx in ranks(2, _second_gradient, name):
        assert torch.allclose(ddx, torch.full_like(ddx, row_sum))


@pytest.mark.parametrize("name", CASES)
def test_axis_of_one_returns_its_input(name):
    x = torch.ones(3, 5, requires_grad=True)
    assert CASES[name][0](x, Axis.single("tp"), 1) is x


def _split_frees_the_whole():
    x = torch.ones(8, 4)
    return split_to(x, _axis(), 0).untyped_storage().nbytes()


def test_split_does_not_keep_the_whole_alive(ranks):
    assert ranks(2, _split_frees_the_whole) == [4 * 4 * 4] * 2
