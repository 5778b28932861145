"""`pypar.recompute`: gradients of the same bits, and what a forward must keep to for that."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pypar
from pypar.models import Decoder, DecoderConfig
from pypar.pipeline_parallel.split_backward import SplitBackward
from pypar.recomputation import SavedBytes
from pypar.recomputation.apply import recomputed

WIDTH = 8
POLICIES = [("full", None), ("selective", None), ("selective", ["attention", "layer_norm"])]
all_policies = pytest.mark.parametrize(("policy", "ops"), POLICIES, ids=str)


class Layer(nn.Module):
    """Torch's own operators: dropout, a convolution, attention, a bias, an argument by keyword, a tuple."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix, self.drop = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Dropout(0.4)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, given, *, scale):
        x, count = given
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.drop(self.mix(y.mT).mT)
        return x + self.frozen(F.gelu(y)) * scale, count + 1


class Model(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x):
        given = x, 0
        for layer in self.layers:
            given = layer(given, scale=0.5)
        return given[0].square().sum()


def seeded(make):
    torch.manual_seed(1)
    return make()


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def outcome(model, x=None, autocast=False):
    """(loss, gradients of input and parameters, the next random number)."""
    x = (numbers(2, 6, WIDTH) if x is None else x).requires_grad_()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x)
    middle = torch.rand(())
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters()), middle, torch.rand(())]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True])
@all_policies
def test_gradients_and_random_numbers_are_the_same_bits(policy, ops, autocast):
    model = pypar.recompute(seeded(Model), policy, ops=ops, checksums=True)
    assert recomputed(model) == ["layers.0", "layers.1", "layers.2"]
    for _ in range(2):  # the second time it is known whether torch's operators are called
        found, expected = (outcome(m, autocast=autocast) for m in (model, seeded(Model)))
        assert_same(found, expected)
        model.zero_grad()


class _Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # which would import the compiler

    def __init__(self):
        super().__init__()
        self.counts = {"mm": 0, "attention_forward": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname.replace("addmm", "mm").replace("linear_forward", "mm")
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "ops", "again"),
    [
        ("full", None, {"mm": 6, "attention_forward": 1}),  # six of the seven products of a layer
        ("selective", None, {"mm": 0, "attention_forward": 0}),
        ("selective", ["attention"], {"mm": 6, "attention_forward": 0}),
    ],
)
def test_what_a_layer_computes_again(policy, ops, again):
    config = DecoderConfig(16, 2, 16, 2, 1, 8, 24)
    counts = []
    for each in ("none", policy):
        model = pypar.recompute(Decoder(config), each, ops=ops if each == policy else None)
        loss = model(torch.arange(8)[None], targets=torch.arange(8)[None])
        with _Products() as products:
            loss.backward()
        counts.append(products.counts)
    assert {name: counts[1][name] - counts[0][name] for name in again} == {n: 2 * c for n, c in again.items()}


def test_a_backward_in_two_parts_computes_a_block_again_once():
    class Counted(Layer):
        calls = 0

        def forward(self, given, *, scale):
            Counted.calls += 1
            return super().forward(given, scale=scale)

    model = pypar.recompute(seeded(lambda: Model(Counted)))
    x = numbers(2, 6, WIDTH).requires_grad_()
    torch.manual_seed(7)
    backward = SplitBackward(model(x), [x])
    (gradient,) = backward.input_gradients()
    backward.weight_gradients()
    assert Counted.calls == 6
    expected = outcome(seeded(lambda: Model(Layer)))
    assert torch.equal(gradient, expected[1])
    for p, other in zip(model.parameters(), expected[2:], strict=False):
        assert p.grad is None or torch.allclose(p.grad, other, rtol=1e-6, atol=1e-6)


def test_a_graph_that_is_retained_and_one_that_is_not_differentiated():
    model, plain = pypar.recompute(seeded(Model)), seeded(Model)
    results = []
    for each in (model, plain):
        torch.manual_seed(7)
        loss = each(numbers(2, 6, WIDTH))
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in each.parameters()])
    assert_same(*results)
    with torch.no_grad(), SavedBytes() as counted:
        model(numbers(2, 6, WIDTH))
    assert counted.num_bytes == 0


def test_blocks_inside_blocks_and_checkpoints_of_torch():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.ModuleList(Model() for _ in range(2))

        def forward(self, x):
            return self.outer[0](x) + checkpoint(self.outer[1], x, use_reentrant=False)

    model = pypar.recompute(
        seeded(Nested), "selective", blocks=["outer.0", "outer.0.layers.1", "outer.1.layers.2"]
    )
    assert_same(outcome(model), outcome(seeded(Nested)))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_copies_pickles_names_and_the_way_back(policy):
    model = seeded(Model)
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    pypar.recompute(model, policy, every=2)
    assert recomputed(model) == ["layers.0", "layers.2"]
    assert list(model.state_dict()) == names and isinstance(model.layers[0], Layer)
    expected = outcome(copy.deepcopy(model))
    assert_same(outcome(pickle.loads(pickle.dumps(copy.deepcopy(model)))), expected)
    pypar.recompute(model, "none")
    assert [type(m) for m in model.modules()] == classes
    assert_same(outcome(model), expected)


def test_an_error_in_a_forward_that_runs_again_leaves_a_usable_model():
    model, plain = pypar.recompute(seeded(Model)), seeded(Model)
    loss = model(numbers(2, 6, WIDTH))
    hook = model.layers[1].norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    hook.remove()
    model.zero_grad()
    assert_same(outcome(model), outcome(plain))


@pytest.mark.parametrize(
    ("policy", "ops"),
    [pytest.param(*p, id=str(p), marks=pytest.mark.slow) for p in POLICIES],
)
def test_a_compiled_model(policy, ops):
    """The compiler has its own checkpoint, whose graphs must not break."""
    config = DecoderConfig(16, 2, 16, 2, 1, 8, 24)
    model, plain = (seeded(lambda: Decoder(config)) for _ in range(2))
    compiled = torch.compile(pypar.recompute(model, policy, ops=ops), backend="aot_eager", fullgraph=True)
    ids = torch.arange(8)[None]
    compiled(ids, targets=ids).backward()
    plain(ids, targets=ids).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_are_recomputed():
    model, plain = (seeded(Model) for _ in range(2))
    for each in (model, plain):
        for layer in each.layers:
            layer.drop.p = 0.0
            layer.compile(backend="aot_eager")
    pypar.recompute(model)
    assert_same(outcome(model), outcome(plain))
    assert recomputed(model)


@all_policies
def test_fake_tensors(policy, ops):
    """As a planner asks what a model would take."""
    with FakeTensorMode():
        model = pypar.recompute(Model(), policy, ops=ops)
        model(torch.ones(2, 6, WIDTH)).backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    config = DecoderConfig(16, 2, 16, 2, 1, 8, 24)
    with torch.device("meta"):
        decoder = pypar.recompute(Decoder(config, seed=None), policy, ops=ops)
        decoder(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
