"""Gradient buckets: the sums, when they start, what they send, and what is refused."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from pypar.comm import wire_bytes
from pypar.data_parallel import GradientBuckets, reduction
from pypar.mesh import Axis, Mesh

WORLDS = [1, 2, 4]
SINGLE = Axis.single("data")


class Model(nn.Module):
    """Odd sizes, a tied weight, a parameter that no loss uses and a frozen one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 11)
        self.second = nn.Linear(11, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.head(self.frozen(hidden + self.second(self.first(hidden).tanh())))


def make_model(seed=0):
    torch.manual_seed(seed)
    return Model()


def loss_of(model, rank, step, microbatch=0):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + microbatch)
    ids, targets = torch.randint(7, (2, 3, 4), generator=generator)
    return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def reduced_without_buckets(axis, steps, num_microbatches, average=False):
    """Each gradient all-reduced by itself after backward, of the last step."""
    model = make_model()
    for step in range(steps):
        model.zero_grad()
        for microbatch in range(num_microbatches):
            loss_of(model, axis.rank, step, microbatch).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if axis.size > 1:
                dist.all_reduce(grad, group=axis.group)
            parameter.grad = grad / axis.size if average else grad
    return gradients(model)


def run_steps(world_size, bucket_bytes, num_microbatches, average):
    axis = Mesh(dp=world_size).data
    model = make_model()
    made = GradientBuckets(
        model.parameters(), axis, bucket_bytes=bucket_bytes, first_bucket_bytes=64, average=average
    )
    for step in range(2):
        made.zero()
        with made.accumulate():
            for microbatch in range(num_microbatches - 1):
                loss_of(model, axis.rank, step, microbatch).backward()
        loss_of(model, axis.rank, step, num_microbatches - 1).backward()
        made.finish()
    return gradients(model), reduced_without_buckets(axis, 2, num_microbatches, average), made.num_buckets


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("world_size", WORLDS)
def test_sums_equal_those_of_single_gradients(ranks, world_size, num_microbatches, average):
    num_buckets = []
    for bucket_bytes in (1, 100, 1 << 20):
        results = ranks(world_size, run_steps, world_size, bucket_bytes, num_microbatches, average)
        num_buckets.append(results[0][2])
        for actual, expected, _ in results:
            for name, gradient in actual.items():
                assert torch.equal(gradient, expected[name]), name
                assert torch.equal(gradient, results[0][0][name]), f"ranks differ in {name}"
    assert num_buckets[0] > num_buckets[1] > num_buckets[2]


def run_exact(world_size, bucket_bytes):
    """Gradients are whole numbers: sums have no rounding, whatever their order."""
    axis = Mesh(dp=world_size).data
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 63, 111, 1023)]
    factors = [torch.randint(-99, 99, p.shape) for p in parameters]
    made = GradientBuckets(parameters, axis, bucket_bytes=bucket_bytes)
    sum((p * f).sum() for p, f in zip(parameters, factors, strict=True)).mul(axis.rank + 1).backward()
    made.finish()
    total = world_size * (world_size + 1) // 2
    return all(torch.equal(p.grad, f * float(total)) for p, f in zip(parameters, factors, strict=True))


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("world_size", WORLDS)
def test_sums_of_whole_numbers_are_exact(ranks, world_size, bucket_bytes):
    assert all(ranks(world_size, run_exact, world_size, bucket_bytes))


# ---- what is sent, and when


def run_traffic(world_size):
    axis = Mesh(dp=world_size).data
    model = make_model()
    made = GradientBuckets(model.parameters(), axis, bucket_bytes=200, rebuild=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    axis.traffic.reset()
    with made.accumulate():
        loss_of(model, axis.rank, 0, 0).backward()
    silent = axis.traffic.snapshot()
    loss_of(model, axis.rank, 0, 1).backward()
    made.finish()
    return silent, axis.traffic.snapshot(), made.num_buckets, sum(p.nbytes for p in trained)


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_gradient_is_sent_once_and_nothing_while_accumulating(ranks, world_size):
    for silent, total, num_buckets, num_bytes in ranks(world_size, run_traffic, world_size):
        assert not silent.calls and silent.bytes_sent == 0
        if world_size == 1:
            assert not total.calls
        else:
            assert total.calls == {"all_reduce": num_buckets}
            assert (
                abs(total.bytes_sent - wire_bytes("all_reduce", num_bytes, world_size)) < num_buckets
            )  # rounding


def run_overlap():
    """Which layers' backward had run when each bucket started."""
    axis = Mesh(dp=2).data
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    events = []
    for i, layer in enumerate(layers):
        layer.register_full_backward_pre_hook(lambda *_, i=i: events.append(f"backward {i}"))
    start = reduction.all_reduce_start

    def recorded(flat, axis, *op):
        events.append(f"start {flat.numel() // 64}")
        return start(flat, axis, *op)

    made = GradientBuckets(layers.parameters(), axis, bucket_bytes=2 * 256, first_bucket_bytes=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "all_reduce_start", recorded)
        layers(torch.ones(1, 8, requires_grad=True)).sum().backward()
        events.append("finish")
        made.finish()
    return events


def test_buckets_start_while_backward_runs(ranks):
    for events in ranks(2, run_overlap):
        assert events == [
            *("backward 3", "start 1"),  # the first bucket is small
            *("backward 2", "backward 1", "start 2"),
            *("backward 0", "start 1", "finish"),
        ]


def run_orders_that_differ():
    """Each rank uses the layers in another order, and one rank leaves one out."""
    axis = Mesh(dp=2).data
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    parameters = [p for layer in layers for p in layer.parameters()]

    def backward():
        hidden = torch.ones(1, 4)
        for i in ((0, 1, 2, 3), (3, 1, 0))[axis.rank]:
            hidden = layers[i](hidden).tanh()
        hidden.sum().backward()

    backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    made = GradientBuckets(parameters, axis, bucket_bytes=1)
    made.zero()
    backward()
    made.finish()
    return own, [p.grad for p in parameters]


def test_ranks_may_compute_in_different_orders(ranks):
    """Buckets start in one order everywhere, so ranks neither hang nor add up different gradients."""
    (own_first, first), (own_second, second) = ranks(2, run_orders_that_differ)
    for a, b, sum_a, sum_b in zip(own_first, own_second, first, second, strict=True):
        assert torch.equal(sum_a, a + b) and torch.equal(sum_b, a + b)


# ---- param.grad in the user's hands


def run_user_gradients(way):
    axis = Mesh(dp=2).data
    model = make_model()
    made = GradientBuckets(model.parameters(), axis, bucket_bytes=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        if way == "zero_grad":
            optimizer.zero_grad()
        elif way == "new tensors":
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        elif way == "zero":
            made.zero()
        with made.accumulate():
            loss_of(model, axis.rank, step, 0).backward()
        loss_of(model, axis.rank, step, 1).backward()
        made.finish()
    views = all(p.grad is made.gradient(p) for p in model.parameters() if p.requires_grad)
    return gradients(model), reduced_without_buckets(axis, 2, 2), views


@pytest.mark.parametrize("way", ["zero", "zero_grad", "new tensors"])
def test_gradients_that_the_user_replaced_are_taken_in(ranks, way):
    for actual, expected, views in ranks(2, run_user_gradients, way):
        assert views
        for name, gradient in actual.items():
            assert torch.equal(gradient, expected[name]), name


def test_a_gradient_set_to_none_and_then_not_computed_counts_as_zero():
    """The bucket still holds the sum of the step before."""
    used, left_out = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    made = GradientBuckets([used, left_out], SINGLE)
    (used.sum() + left_out.sum()).backward()
    made.finish()
    used.grad = left_out.grad = None
    used.sum().backward()
    made.finish()
    assert left_out.grad.tolist() == [0.0] * 3 and used.grad.tolist() == [1.0] * 2


def test_gradients_from_before_are_kept():
    weight = nn.Parameter(torch.ones(3))
    (2 * weight).sum().backward()
    made = GradientBuckets([weight], SINGLE)
    weight.sum().backward()
    made.finish()
    assert weight.grad.tolist() == [3.0] * 3 and weight.grad is made.gradient(weight)


def test_scale_and_two_sets_of_buckets_in_one_process():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one, other = GradientBuckets(first.parameters(), SINGLE), GradientBuckets(second.parameters(), SINGLE)
    first(torch.ones(3)).sum().backward()
    one.finish()
    one.scale(0.5)
    assert first.weight.grad.tolist() == [[0.5] * 3] * 2
    assert not other.gradient(second.weight).any()


def test_close_gives_the_parameters_back():
    layer = nn.Linear(3, 2)
    old = GradientBuckets(layer.parameters(), SINGLE)
    old.close()
    new = GradientBuckets(layer.parameters(), SINGLE)
    for _ in range(2):
        new.zero()
        layer(torch.ones(3)).sum().backward()
        new.finish()
    assert layer.bias.grad.tolist() == [1.0, 1.0] and layer.bias.grad is new.gradient(layer.bias)


def test_dropped_buckets_are_freed():
    layer = nn.Linear(3, 2)
    alive = weakref.ref(GradientBuckets(layer.parameters(), SINGLE))
    gc.collect()
    assert alive() is None
