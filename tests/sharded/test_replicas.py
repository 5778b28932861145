"""Data parallelism, pypar's and torch's, over a model that is cut: over ranks with the same part, or refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pypar
from pypar.layout import local_tensor
from pypar.mesh import Mesh
from pypar.sharded import Sharded
from pypar.tensor_parallel import ColumnParallelLinear
from tests.sharded.cases import PLAN, assert_same, backward, make, pair


def accepted_or_not(make_it):
    try:
        return f"accepted: {make_it()}"
    except ValueError as error:
        return str(error)


def run_wrong_group():
    mesh = Mesh(tp=2)
    messages = {}
    for name, wrap in {
        "DataParallel": pypar.DataParallel,
        "DataParallel over tp": lambda m: pypar.DataParallel(m, mesh.tp),
        "summing gradients": lambda m: pypar.GradientBuckets(m.parameters(), dist.group.WORLD),
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "DistributedDataParallel over a group": lambda m: nn.parallel.DistributedDataParallel(
            m, process_group=mesh.tp.group
        ),
    }.items():
        cut = pypar.parallelize(make(), mesh, PLAN)
        before = local_tensor(cut.up.weight).clone()
        messages[name] = accepted_or_not(lambda wrap=wrap, cut=cut: wrap(cut))
        assert torch.equal(local_tensor(cut.up.weight), before)
    return messages


def test_ranks_of_one_tp_axis_are_no_replicas(ranks):
    for messages in ranks(2, run_wrong_group):
        for name, message in messages.items():
            assert message.startswith(name.partition(" over")[0]), message
            assert "over the ranks [0, 1] would take different parts of" in message
            assert "give it the group of ranks that hold the same part, mesh.data or mesh.dp.group" in message


def run_crossed_group():
    """Ranks 0 and 3 of tp axes (0, 1) and (2, 3): no two of one axis, but other parts."""
    mesh = Mesh(tp=2, dp=2)
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])][dist.get_rank() in (1, 2)]
    cut = pypar.parallelize(make(), mesh, PLAN)
    return [
        accepted_or_not(lambda: pypar.DataParallel(cut, crossed)),
        accepted_or_not(lambda: pypar.GradientBuckets(cut.parameters(), crossed)),
        accepted_or_not(lambda: nn.parallel.DistributedDataParallel(cut, process_group=crossed)),
    ]


def test_ranks_with_other_parts_are_no_replicas(ranks):
    for messages in ranks(4, run_crossed_group):
        assert ["accepted" not in message and "ranks" in message for message in messages] == [True] * 3


def wrapped_models(mesh):
    options = {"gradient_as_bucket_view": True}
    yield lambda m: pypar.DataParallel(m, mesh.data), lambda m: None
    yield lambda m: pypar.DataParallel(m, mesh.data, gradient_as_bucket_view=False), lambda m: None
    yield lambda m: nn.parallel.DistributedDataParallel(m, process_group=mesh.dp.group), lambda m: None
    yield (
        lambda m: nn.parallel.DistributedDataParallel(m, process_group=mesh.dp.group, **options),
        lambda m: None,
    )


def run_replicas():
    """Two steps with clipping, each data rank with batches of its own, as one process does them."""
    mesh = Mesh(tp=2, dp=2)
    whole = make()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            backward(whole, seed=10 * step + rank, scale=0.5)
        nn.utils.clip_grad_norm_(whole.parameters(), 0.3)
        optimizer.step()
    for wrap, _ in wrapped_models(mesh):
        cut = pypar.parallelize(make(), mesh, PLAN)
        model = wrap(cut)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, seed=10 * step + mesh.dp.rank)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        assert isinstance(cut.up.weight.grad, Sharded)
        assert_same(cut, whole, 1e-4, 1e-5)
    return True


def test_replicas_train_as_one_process(ranks):
    assert all(ranks(4, run_replicas))


def run_buckets():
    """GradientBuckets over dp, sums and accumulation; the gradients that they show are cut."""
    mesh = Mesh(tp=2, dp=2)
    whole = make()
    for seed in (0, 1, 10, 11):
        backward(whole, seed=seed)
    for options in ({}, {"bucket_bytes": 1}, {"gradient_dtype": torch.float64}, {"average": True}):
        cut = pypar.parallelize(make(), mesh, PLAN)
        buckets = pypar.GradientBuckets(cut.parameters(), mesh.data, **options)
        for _ in range(2):
            buckets.zero()
            with buckets.accumulate():
                backward(cut, seed=mesh.dp.rank)
            assert all(p.grad is None or p.grad is p.grad for p in cut.parameters())
            backward(cut, seed=10 + mesh.dp.rank)
            buckets.finish()
        if options.get("average"):
            buckets.scale(2.0)
        gradients = [buckets.gradient(p) for p in cut.parameters()]
        assert [isinstance(g, Sharded) for g in gradients] == [
            isinstance(p, Sharded) for p in cut.parameters()
        ]
        assert_same([g.float() for g in gradients], [p.grad for p in whole.parameters()])
        if "gradient_dtype" not in options:
            norm = nn.utils.clip_grad_norm_(cut.parameters(), 0.1)
            expected = sum(p.grad.norm() ** 2 for p in whole.parameters()).sqrt()
            torch.testing.assert_close(norm, expected)
            assert float(sum(p.grad.norm() ** 2 for p in cut.parameters())) < 0.0101
    return True


def test_gradient_buckets_over_replicas(ranks):
    assert all(ranks(4, run_buckets))


def run_collectives():
    mesh = Mesh(tp=2, dp=2)
    layer = ColumnParallelLinear(4, 6, mesh.tp)
    layer(torch.ones(2, 4)).sum().backward()
    grad, before = layer.weight.grad, local_tensor(layer.weight.grad).clone()
    messages = [
        accepted_or_not(lambda: dist.all_reduce(grad)),
        accepted_or_not(lambda: dist.all_reduce(grad, group=mesh.tp.group)),
        accepted_or_not(lambda: dist.broadcast(layer.weight.data, 0)),
        accepted_or_not(lambda: dist.all_gather([torch.empty(6, 4)] * 2, grad, group=mesh.tp.group)),
    ]
    dist.all_reduce(grad, group=mesh.dp.group)
    assert torch.equal(local_tensor(grad), 2 * before)
    return messages


@pytest.mark.skipif(
    not hasattr(dist.distributed_c10d, "has_torch_function"), reason="this torch asks no tensor"
)
def test_collectives_of_torch_between_parts_are_refused(ranks):
    for first, second, third, fourth in ranks(4, run_collectives):
        for message in (first, second, third):
            assert (
                "would add up or overwrite different parts of weight of ColumnParallelLinear (6, 4)"
                in message
            )
        assert "all_gather would mix the parts of" in fourth


def run_fsdp():
    from torch.distributed.fsdp import fully_shard

    _, cut = pair()
    before = local_tensor(cut.up.weight).clone()
    message = accepted_or_not(lambda: fully_shard(cut))
    assert torch.equal(local_tensor(cut.up.weight), before)
    return message


def test_fully_shard_is_refused(ranks):
    for message in ranks(2, run_fsdp):
        assert "would mix the parts of tokens.weight (12, 8)" in message
