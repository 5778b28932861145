"""`pypar.offload_activations`: the same bits, every byte where the formula says, and nothing left behind."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

import pypar
from pypar.arenas import OverBudgetError
from pypar.models import Decoder, DecoderConfig
from pypar.models.activations import Microbatch, layer_bytes, peak_bytes
from pypar.ops import native
from pypar.pipeline_parallel.split_backward import SplitBackward
from pypar.recomputation import SavedBytes
from pypar.recomputation.offload import Offload
from pypar.recomputation.operators import COSTLY
from pypar.recomputation.parts import part_of
from tests.recomputation.test_recompute import WIDTH, Model, assert_same, numbers, outcome, seeded

SIZES = {"vocab_size": 40, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "head_size": 8, "d_ff": 52}
B, T = 2, 19
POLICIES = ("none", "full", "selective")
all_policies = pytest.mark.parametrize("policy", POLICIES)


def offload_of(model):
    return next(part.offload for part in map(part_of, model.modules()) if part is not None)


def moving(model, policy="none", **options):
    return pypar.offload_activations(model, policy, min_bytes=1, **options)


@pytest.mark.parametrize("autocast", [False, True])
@all_policies
def test_gradients_and_random_numbers_are_the_same_bits(policy, autocast):
    model = moving(seeded(Model), policy)
    for _ in range(2):
        assert_same(outcome(model, autocast=autocast), outcome(seeded(Model), autocast=autocast))
        model.zero_grad()
    assert offload_of(model).host_peak and not offload_of(model).host_now


def chain(num_layers, policy, offloads, dtype):
    """(bytes held after the forward of so many layers, the most of a step, the same on the host)."""
    decoder = Decoder(DecoderConfig(num_layers=num_layers, **SIZES), dtype=dtype)
    if offloads:
        moving(decoder, policy)
    else:
        pypar.recompute(decoder, policy)
    tables = decoder.rope_tables(torch.arange(T))
    x = torch.ones(B, T, SIZES["d_model"], dtype=dtype, requires_grad=True) + 1  # that nobody else holds
    with SavedBytes(decoder) as saved:
        for layer in decoder.layers.values():
            x = layer(x, *tables)
        now = saved.num_bytes
        x.sum().backward()
    beside = sum(table.nbytes for table in tables)
    host = offload_of(decoder) if offloads else None
    if host is not None:
        assert host.to_host == host.to_device == host.host_peak  # each byte goes once, and comes back
    return now - beside, saved.peak_bytes - beside, host.host_peak if host is not None else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offloads", [False, True])
@all_policies
def test_the_most_at_once_is_what_the_formula_says(policy, offloads, dtype):
    given = Microbatch(
        B, T, dtype.itemsize, lse_copies=2 if dtype == torch.float32 and not native.missing() else 1
    )
    kept = COSTLY if policy == "selective" else ()
    for num_layers in (1, 2, 5):
        config = DecoderConfig(num_layers=num_layers, **SIZES)
        now, most, host = chain(num_layers, policy, offloads, dtype)
        held = peak_bytes(config, given, recomputed=policy != "none", kept=kept, offloaded=offloads)
        assert (most, host) == (held.device, held.host)
        each = layer_bytes(config, given, recomputed=policy != "none", kept=kept)
        assert now == each * (1 if offloads else num_layers)


class Shared(nn.Module):
    """Many tensors in one piece of memory, a parameter that is saved, a table that needs no gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x, table):
        whole = x.exp()
        a, b = whole[:8], whole[8:]
        return torch.cat([a * b, b * a]) * self.weight * table


def test_memory_moves_once_and_what_stays_anyway_does_not():
    model = nn.ModuleDict({"layers": nn.ModuleList(Shared() for _ in range(2))})
    layers = model["layers"]
    x, table = torch.ones(16, 64, requires_grad=True), torch.ones(16, 64)
    moving(model)
    y = layers[1](layers[0](x, table), table)
    # What exp returned, which both products save too, and what the weight is multiplied with.
    assert offload_of(model).host_now == 2 * x.nbytes
    y.sum().backward()
    assert offload_of(model).host_now == 0
    pypar.offload_activations(model, min_bytes=x.nbytes + 1)
    layers[1](layers[0](x, table), table).sum().backward()
    assert offload_of(model).host_peak == 0


@pytest.mark.parametrize("num_leaving", [1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
@all_policies
def test_several_microbatches_in_flight(policy, order, num_leaving):
    model, plain = moving(seeded(Model), policy, num_leaving=num_leaving), seeded(Model)
    for each in (model, plain):
        torch.manual_seed(3)
        losses = [each(numbers(2, 6, WIDTH) * (i + 1)) for i in range(3)]
        for i in order:
            losses[i].backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert not offload_of(model).host_now


@all_policies
def test_a_backward_in_two_parts_and_a_retained_graph(policy):
    results = []
    for each in (moving(seeded(Model), policy), seeded(Model)):
        x = numbers(2, 6, WIDTH).requires_grad_()
        torch.manual_seed(7)
        backward = SplitBackward(each(x), [x])
        (gradient,) = backward.input_gradients()
        backward.weight_gradients()
        torch.manual_seed(7)
        loss = each(x)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([gradient, x.grad, *(p.grad for p in each.parameters())])
    assert_same(*results)


@pytest.mark.parametrize("where", ["forward", "backward"])
@all_policies
def test_an_error_in_the_middle_leaves_a_usable_model_and_nothing_on_the_host(policy, where):
    model = moving(seeded(Model), policy)
    hook = model.layers[1].norm.register_forward_pre_hook(lambda *_: 1 / 0)
    if where == "backward":
        hook.remove()
        hook = model.layers[1].mix.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(model)
    hook.remove()
    model.zero_grad()
    assert_same(outcome(model), outcome(seeded(Model)))
    gc.collect()
    assert not offload_of(model).host_now


def test_what_is_written_into_while_it_leaves_is_an_error():
    class Writing(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
            self.index = index

        def forward(self, x):
            for index, layer in enumerate(self.layers):
                hidden = layer(x)
                x = hidden * 2
                if index == self.index:
                    hidden.add_(1)
            return x.sum()

    for index in range(3):  # the last layer's stays
        with pytest.raises(
            RuntimeError, match=r"a tensor \(2, 6, 8\) that backward needs was written into after"
        ):
            outcome(moving(Writing(index)))


def test_more_than_the_host_may_have_is_an_error():
    model = moving(seeded(Model), host_bytes=1000)
    with pytest.raises(
        OverBudgetError, match=r"the host \(activations\) arena holds .* bytes of its budget of 1,000"
    ):
        outcome(model)
    gc.collect()
    assert not offload_of(model).host_now


def test_copies_pickles_and_the_way_back():
    model = moving(seeded(Model), "selective")
    expected = outcome(copy.deepcopy(model))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert offload_of(again) is not offload_of(model) and offload_of(again).min_bytes == 1
    assert_same(outcome(again), expected)
    pypar.recompute(model, "none")
    assert all(part_of(module) is None for module in model.modules())
    assert_same(outcome(model), expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_bytes": -1}, r"min_bytes \(-1\) must be a whole number of at least 0"),
        ({"min_bytes": 1.5}, "1.5 is no number of bytes"),
        ({"num_leaving": 0}, r"num_leaving \(0\) must be a whole number of at least 1"),
        ({"num_leaving": True}, r"num_leaving \(True\) must be a whole number"),
        ({"host_bytes": 0}, r"host_bytes \(0\) must be a whole number of at least 1"),
        ({"policy": "fully"}, "unknown policy 'fully'"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pypar.offload_activations(Model(), **options)


def test_bytes_may_be_told_as_text():
    offload = Offload(min_bytes="2KB", host_bytes="1.5 GiB")
    assert (offload.min_bytes, offload.host_bytes) == (2000, 3 << 29)


def test_in_a_compiled_model_the_blocks_run_as_they_are_written():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) * 2
            return x.sum()

    model, plain = moving(seeded(Stack)), seeded(Stack)
    x = numbers(4, WIDTH)
    torch.compile(model, backend="eager")(x).backward()
    plain(x).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert offload_of(model).host_peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@all_policies
def test_on_a_gpu_the_bits_are_the_same_and_the_memory_is_given_back(policy):
    results, most = [], []
    for offloads in (False, True):
        model = seeded(lambda: Decoder(DecoderConfig(64, 8, 256, 4, 2, 64, 704))).cuda()
        pypar.recompute(model, policy)
        if offloads:
            pypar.offload_activations(model, policy, min_bytes=1)
        tokens = torch.arange(1025, device="cuda")[None] % 64
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        most.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    assert_same(*results)
    assert most[1] < most[0]
    assert not offload_of(model).host_now


def test_memory_on_its_way_back_is_there_for_the_copy():
    """A backward that ends with an error drops what it has begun to bring back, and waits for nothing."""
    offload = Offload(min_bytes=1)
    moved = offload.moved(torch.ones(1 << 16))
    moved.leave()
    moved.left()
    host, copies = offload.engine(torch.device("cpu"))
    gate = threading.Event()
    copies._own_thread().submit(gate.wait)
    here, coming = moved.come(), moved._coming
    del moved
    gc.collect()
    assert host.now == 0 and not coming.is_over
    gate.set()
    coming.wait()
    assert torch.equal(here.view(torch.float32), torch.ones(1 << 16))
