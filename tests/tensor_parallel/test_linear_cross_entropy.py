"""linear_cross_entropy with the vocabulary cut over ranks: losses and gradients of one device."""

import math
import os
import sys

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar.mesh import Axis, Mesh
from pypar.ops.backend.gpu import TRITON_MISSING
from tests.harness.samples import draw, relative

PTXRUN = os.environ.get("PYPAR_PTXRUN", "")
WORLDS = [1, 2, 4]
WORDS, WIDTH, TOKENS = 203, 16, 150  # three chunks; words that divide nothing
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01},
    "none": {"reduction": "none", "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01},
}


def problem(dtype=torch.float32):
    hidden, weight, bias = (
        draw(3, TOKENS // 3, WIDTH, seed=1),
        draw(WORDS, WIDTH, seed=2),
        draw(WORDS, seed=3),
    )
    bias[: WORDS // 2] = -math.inf  # ranks that have nothing but words that are ruled out
    target = torch.randint(WORDS // 2, WORDS, (3, TOKENS // 3), generator=torch.Generator().manual_seed(4))
    target[0, 3:9] = -100
    return hidden.to(dtype), weight.to(dtype), bias, target


def step(hidden, weight, bias, target, name, group=None, twice=False, backend=None):
    options = dict(OPTIONS[name])
    if "label_smoothing" in options:
        bias = bias.nan_to_num(neginf=-3.0)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = pypar.linear_cross_entropy(
        leaves[0],
        leaves[1],
        target,
        bias=leaves[2],
        group=group,
        backend=backend,
        return_lse=True,
        return_logprob=True,
        **options,
    )
    dout = draw(*out[0].shape, seed=5) if out[0].dim() else torch.tensor(3.0)
    gradients = torch.autograd.grad(out[0], leaves, dout, retain_graph=twice)
    if twice:
        again = torch.autograd.grad(out[0], leaves, dout)
        torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-5)
    return [x.detach() for x in (*out, *gradients)]


def run(name, backend, dtype):
    group = dist.new_group(backend=backend)
    try:
        hidden, weight, bias, target = problem(dtype)
        rank, size = dist.get_rank(), dist.get_world_size()
        part = [x.tensor_split(size)[rank] for x in (weight, bias)]
        return step(hidden, *part, target, name, group, twice=True)
    finally:
        dist.destroy_process_group(group)


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_equals_one_device(ranks, world_size, name, backend):
    expected = step(*problem(), name)
    results = ranks(world_size, run, name, backend, torch.float32)
    for result in results:
        for number in range(4):  # loss, lse, logprob, hidden's gradient
            assert torch.equal(result[number], results[0][number])
            assert relative(result[number], expected[number]) < 1e-5
    for number in (4, 5):
        whole = torch.cat([result[number] for result in results])
        assert relative(whole, expected[number]) < 1e-5


def by_triton(name, dtype):
    """This rank's part by Triton's kernels, whose PTX runs in an interpreter; few tokens."""
    sys.path.insert(0, PTXRUN)
    from pypar.kernels.launch import launches_go_to
    from tests.harness.row_kernels import runner_of_ptx

    hidden, weight, bias, target = problem(dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    part = [x.tensor_split(size)[rank] for x in (weight, bias)]
    with launches_go_to(runner_of_ptx(80)):
        return step(hidden[:, :5], *part, target[:, :5], name, dist.group.WORLD, backend="triton")


@pytest.mark.slow
@pytest.mark.skipif(not PTXRUN, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun")
@pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
@pytest.mark.parametrize(("name", "dtype"), [("sum", torch.bfloat16), ("none", torch.float32)], ids=str)
def test_parts_by_triton(ranks, name, dtype):
    hidden, weight, bias, target = problem(dtype)
    expected = step(hidden[:, :5], weight, bias, target[:, :5], name, backend="reference")
    results = ranks(2, by_triton, name, dtype)
    limit = 1e-5 if dtype == torch.float32 else 0.01
    for result in results:
        torch.testing.assert_close(result[:3], expected[:3], rtol=1e-5, atol=1e-5)
        assert relative(result[3].float(), expected[3].float()) < limit
    for number in (4, 5):
        whole = torch.cat([result[number] for result in results])
        assert relative(whole.float(), expected[number].float()) < limit


@pytest.mark.parametrize("name", ["mean", "none"])
def test_of_bf16(ranks, name):
    expected = step(*problem(torch.bfloat16), name)
    results = ranks(2, run, name, "pypar", torch.bfloat16)
    torch.testing.assert_close(results[0][0], expected[0], rtol=1e-6, atol=1e-6)
    assert relative(results[0][3].float(), expected[3].float()) < 0.01
    assert relative(torch.cat([result[4] for result in results]).float(), expected[4].float()) < 0.01


def run_counted():
    axis = Mesh(tp=2).tp
    hidden, weight, bias, target = problem()
    parts = [x.tensor_split(2)[axis.rank].requires_grad_() for x in (weight, bias)]
    loss = pypar.linear_cross_entropy(hidden.requires_grad_(), parts[0], target, group=axis)
    forward = axis.traffic.snapshot()
    loss.backward()
    return forward.calls, axis.traffic.snapshot().calls


def test_traffic(ranks):
    """One gather of sizes, and for each of three chunks one of statistics and one sum; backward sends nothing."""
    for forward, after in ranks(2, run_counted):
        assert forward == {"all_gather": 4, "all_reduce": 3} and after == forward


def run_all_ignored():
    axis = Axis.of(dist.group.WORLD, "tp")
    hidden, weight, _, target = problem()
    hidden, weight = (x.requires_grad_() for x in (hidden * math.nan, weight.tensor_split(2)[axis.rank]))
    loss = pypar.linear_cross_entropy(hidden, weight, torch.full_like(target, -100), group=axis)
    loss.backward()
    return [loss.item(), hidden.grad.abs().sum().item(), weight.grad.abs().sum().item()]


def test_all_ignored(ranks):
    assert ranks(2, run_all_ignored) == [[0, 0, 0]] * 2


def run_refusals():
    axis = Axis.of(dist.group.WORLD, "tp")
    hidden, weight, _, target = problem()
    weight = weight.tensor_split(2)[axis.rank]
    sentences = {}
    calls = {
        "target": lambda: pypar.linear_cross_entropy(hidden, weight, target + WORDS, group=axis),
        "one rank": lambda: pypar.linear_cross_entropy(
            hidden, weight if axis.rank else weight[:, 1:], target, group=axis
        ),
        "frozen": lambda: pypar.linear_cross_entropy(
            hidden, weight.clone().requires_grad_(axis.rank == 0), target, group=axis
        ),
        "option": lambda: pypar.linear_cross_entropy(hidden, weight, target, group=axis, reduction="max"),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            sentences[name] = str(error)
    return sentences


def test_refusals_are_on_every_rank(ranks):
    first, second = ranks(2, run_refusals)
    for sentences in (first, second):
        assert "outside of [0, 203)" in sentences["target"]
        assert "call linear_cross_entropy differently" in sentences["frozen"]
        assert "reduction is 'max'" in sentences["option"]
    assert "must be [..., H]" in first["one rank"] and "rank 0 of axis tp refuses" in second["one rank"]
