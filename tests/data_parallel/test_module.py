"""pypar.DataParallel against torch's DistributedDataParallel, both over the backend "pypar", bit by bit."""

from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar.data_parallel import DataParallel
from pypar.data_parallel.module import unused_everywhere
from pypar.mesh import Axis
from tests.harness.simulated_ranks import run_ranks

DDP = nn.parallel.DistributedDataParallel


class Model(nn.Module):
    """Batch statistics, a tied weight, and a branch that not every batch takes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 11)
        self.norm = nn.BatchNorm1d(11)
        self.branch = nn.Linear(11, 11)
        self.second = nn.Linear(11, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("angles", torch.linspace(0, 1, 6))

    def forward(self, ids, takes_branch=True):
        hidden = self.norm(self.first(self.embedding(ids) * self.angles))
        if takes_branch:
            hidden = hidden + self.branch(hidden.tanh())
        return self.head(self.second(hidden) * self.angles)


def make(seed=0):
    torch.manual_seed(seed)
    return Model()


def loss_of(model, rank, step, microbatch=0, takes_branch=True):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + microbatch)
    ids, targets = torch.randint(7, (2, 12), generator=generator)
    return nn.functional.cross_entropy(model(ids, takes_branch), targets)


def train(model, num_microbatches, set_to_none, uses_branch):
    """Some steps; the gradients and the state after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rank, history = dist.get_rank(), []
    for step in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        with model.no_sync():
            for microbatch in range(num_microbatches - 1):
                loss_of(model, rank, step, microbatch, uses_branch(rank, step)).backward()
        loss_of(model, rank, step, num_microbatches - 1, uses_branch(rank, step)).backward()
        history.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        history.append({n: x.clone() for n, x in model.state_dict().items()})
    return history


def always(rank, step):
    return True


def on_some_ranks(rank, step):
    return (rank + step) % 2 == 0


def in_even_steps(rank, step):
    return step % 2 == 0


def in_odd_steps(rank, step):
    return step % 2 == 1


def run_both(options, num_microbatches, set_to_none, uses_branch):
    group = dist.new_group(backend="pypar")
    seed = dist.get_rank()  # rank 0's parameters count
    ours = train(DataParallel(make(seed), group, **options), num_microbatches, set_to_none, uses_branch)
    peer = DDP(
        make(seed),
        process_group=group,
        bucket_cap_mb=0.0005,
        find_unused_parameters=uses_branch is not always,
    )
    expected = train(peer, num_microbatches, set_to_none, uses_branch)
    for step, (actual, wanted) in enumerate(zip(ours, expected, strict=True)):
        assert actual.keys() == wanted.keys()
        different = [name for name, x in wanted.items() if not torch.equal(actual[name], x)]
        assert not different, f"step {step // 2}: {different}"
    return True


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("options", "num_microbatches", "set_to_none", "uses_branch"),
    [
        ({}, 1, True, always),
        ({"bucket_bytes": 300, "first_bucket_bytes": 64}, 3, True, always),
        ({"bucket_bytes": 1}, 2, False, always),
        ({"gradient_as_bucket_view": False}, 2, False, always),
        ({"gradient_as_bucket_view": False, "bucket_bytes": 300}, 1, True, on_some_ranks),
        ({"bucket_bytes": 300}, 2, True, on_some_ranks),
        ({"bucket_bytes": 300, "find_unused_parameters": True}, 2, True, in_even_steps),
        ({"gradient_as_bucket_view": False, "find_unused_parameters": True}, 1, True, in_odd_steps),
        ({"find_unused_parameters": True}, 1, False, in_odd_steps),
        ({"find_unused_parameters": True}, 1, True, on_some_ranks),
    ],
    ids=[
        "one bucket",
        "microbatches",
        "kept gradients",
        "copies",
        "copies, unused",
        "unused",
        "found unused",
        "found unused, copies",
        "found unused, kept gradients",
        "found unused, on some ranks",
    ],
)
def test_same_bits_as_distributed_data_parallel(
    ranks, world_size, options, num_microbatches, set_to_none, uses_branch
):
    """Gradients, weights and batch statistics of four steps; ranks begin with different weights."""
    assert all(ranks(world_size, run_both, options, num_microbatches, set_to_none, uses_branch))


def run_counted():
    """What one step sends, without find_unused_parameters and with."""
    found = []
    for find_unused in (False, True):
        model = DataParallel(make(), broadcast_buffers=False, find_unused_parameters=find_unused)
        loss_of(model, dist.get_rank(), 0).backward()
        before = model.axis.traffic.snapshot()
        model.zero_grad()
        loss_of(model, dist.get_rank(), 1).backward()
        after = model.axis.traffic.snapshot()
        found.append((after.bytes_sent - before.bytes_sent, Counter(after.calls) - Counter(before.calls)))
    return found


def test_finding_unused_parameters_costs_a_byte_a_parameter_and_nothing_when_off(ranks):
    num_parameters = len(list(make().parameters()))
    for (plain_bytes, plain), (num_bytes, calls) in ranks(2, run_counted):
        assert num_bytes == plain_bytes + num_parameters
        assert calls == plain + Counter(all_reduce=1)


def used_by(rank, parameter):
    """Of 8 ranks' parameters 0 is used by all, 1 by none, 2 by some, 3 by the last alone."""
    return (True, False, rank in (2, 5), rank == 7)[parameter]


def unused_as_this_rank_sees_it(axis):
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(4)]
    used = [used_by(axis.rank, parameter) for parameter in range(4)]
    found = unused_everywhere(parameters, used, axis)
    return [any(p is x for x in found) for p in parameters]


def test_unused_is_what_no_rank_uses():
    assert run_ranks(8, unused_as_this_rank_sees_it, name="dp") == [[False, True, False, False]] * 8


def run_repeated_backward():
    """Two backwards before a zero_grad, and one after a step without any."""
    group = dist.new_group(backend="pypar")
    results = []
    for model in (DataParallel(make(), group, bucket_bytes=300), DDP(make(), process_group=group)):
        for step in range(3):
            loss_of(model, dist.get_rank(), step).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_add_up_over_backwards(ranks):
    assert all(ranks(2, run_repeated_backward))


def run_state():
    group = dist.new_group(backend="pypar")
    ours, peer = DataParallel(make(), group), DDP(make(3), process_group=group)
    same_names = list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    plain = make(5)
    plain.load_state_dict(ours.module.state_dict())
    equal = all(torch.equal(x, peer.state_dict()[n]) for n, x in ours.state_dict().items())
    return (
        same_names,
        equal,
        ours.module is not None,
        len(list(ours.parameters())) == len(list(plain.parameters())),
    )


def test_state_dict_is_that_of_distributed_data_parallel(ranks):
    assert ranks(2, run_state) == [(True, True, True, True)] * 2


def run_views():
    group = dist.new_group(backend="pypar")
    view = DataParallel(nn.Linear(3, 2), group)
    copy = DataParallel(nn.Linear(3, 2), group, gradient_as_bucket_view=False)
    found = []
    for model in (view, copy):
        model(torch.ones(3)).sum().backward()
        p = model.module.weight
        found.append(p.grad is model._buckets.gradient(p))
    bf16 = DataParallel(nn.Linear(3, 2), group, comm_dtype=torch.bfloat16)
    bf16(torch.full((3,), 1 + 2.0**-8)).sum().backward()
    return found, bf16.module.weight.grad.flatten().tolist()


def test_views_copies_and_the_communication_dtype(ranks):
    for found, rounded in ranks(2, run_views):
        assert found == [True, False]
        assert rounded == [1.0] * 6  # halves of 1 + 2^-8, rounded to even


def run_buffers():
    """The running mean after a step, and what evaluation on other ranks uses."""
    axis = Axis.of(dist.group.WORLD)
    model = DataParallel(make(), axis, bucket_bytes=300)
    kept = DataParallel(make(), axis, broadcast_buffers=False)
    version = model.module.angles._version
    for each in (model, kept):
        loss_of(each, axis.rank, 0).backward()
        with torch.no_grad():
            each(torch.zeros(2, dtype=torch.long))
            each.eval()(torch.zeros(2, dtype=torch.long))
    return (
        model.module.norm.running_mean,
        kept.module.norm.running_mean,
        model.module.angles._version - version,
    )


def test_buffers_are_those_of_the_first_rank_unless_told_otherwise(ranks):
    (first, kept_first, _), (second, kept_second, writes) = ranks(2, run_buffers)
    assert torch.equal(first, second) and not torch.equal(kept_first, kept_second)
    assert writes == 0  # a constant is not written: backward of an earlier forward may need it


# ---- uneven numbers of steps


def run_one_more_backward(way, broadcast_buffers):
    """Rank 0 runs two backwards, rank 1 one and then something else."""
    group = dist.new_group(backend="pypar", timeout=timedelta(seconds=1 if way == "nothing" else 30))
    model = DataParallel(make(), group, broadcast_buffers=broadcast_buffers)
    loss_of(model, dist.get_rank(), 0).backward()
    message = ""
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as error:
            loss_of(model, 0, 1).backward()
        message = str(error.value)
    elif way == "another collective":
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(3), group=group)
    dist.barrier()
    return message


@pytest.mark.parametrize("broadcast_buffers", [False, True])
@pytest.mark.parametrize("way", ["nothing", "another collective"])
def test_a_rank_that_runs_fewer_backwards_is_named(ranks, way, broadcast_buffers):
    message = ranks(2, run_one_more_backward, way, broadcast_buffers)[0]
    what = (
        "taking the buffers of the first rank"
        if broadcast_buffers
        else "the reduction of gradients in step 2"
    )
    assert message.startswith(f"{what} failed over axis ")
    assert "must run the same number of forward and backward passes" in message
    assert "these ranks did not come: 1" in message if way == "nothing" else "rank 1" in message
