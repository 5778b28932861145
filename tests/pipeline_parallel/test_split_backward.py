"""The backward of a stage in two parts: the gradients of one backward, each product computed once."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pypar.models import Decoder, DecoderConfig
from pypar.pipeline_parallel.split_backward import SplitBackward

WIDTH = 6


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])

    def forward(self, x, _):
        return self.layers(x)


class Shared(Chain):
    """One weight at two places, another through a product with a second one, a scale that is used everywhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, _):
        both = self.first @ self.second
        x = torch.tanh(x @ self.first * self.scale)
        x = torch.tanh(x @ both * self.scale) + x
        return torch.tanh(x @ self.first) @ (both + self.second)


class TwoInputs(Chain):
    """Inputs that meet late; a weight that no input touches; a node with several outputs; an unused weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.alone = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        left, right = self.norm(self.layers(x)).chunk(2, dim=-1)
        low, high = y.unbind(0)
        return torch.cat([left * low[:3], right * high[3:]], -1) + torch.sin(self.alone).exp()


class Checkpointed(Chain):
    def forward(self, x, _):
        return checkpoint(self.layers[:4], self.layers[:1](x), use_reentrant=False)


class OnlyWeights(Chain):
    """The result does not depend on the inputs."""

    def forward(self, x, _):
        return self.layers(torch.ones_like(x))


def _inputs():
    torch.manual_seed(3)
    return [torch.randn(4, WIDTH, requires_grad=True), torch.randn(2, WIDTH, requires_grad=True)]


def _seeded(cls):
    torch.manual_seed(1)
    return cls()


@pytest.mark.parametrize("cls", [Chain, Shared, TwoInputs, Checkpointed, OnlyWeights])
def test_gradients_are_those_of_one_backward(cls):
    whole, split = _seeded(cls), _seeded(cls)
    for step in range(2):  # gradients are added to those that are there
        inputs, again = _inputs(), _inputs()
        (whole(*inputs).square().sum() * (step + 1)).backward()
        backward = SplitBackward(split(*again).square().sum() * (step + 1), again)
        before = [None if p.grad is None else p.grad.clone() for p in split.parameters()]
        gradients = backward.input_gradients()
        for once, p in zip(before, split.parameters(), strict=True):
            assert p.grad is None if once is None else torch.equal(p.grad, once)  # I leaves weights alone
        backward.weight_gradients()
        for one, other in zip(inputs, gradients, strict=True):
            torch.testing.assert_close(other, one.grad, rtol=0, atol=0)
        assert all(x.grad is None for x in again)  # W leaves inputs alone
        for one, other in zip(whole.parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6)


def test_a_chain_is_bitwise_the_same():
    whole, split = _seeded(Chain), _seeded(Chain)
    whole(*_inputs()).square().sum().backward()
    inputs = _inputs()[:1]
    backward = SplitBackward(split(inputs[0], None).square().sum(), inputs)
    backward.input_gradients()
    backward.weight_gradients()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(other.grad, one.grad)


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_each_product_is_computed_in_one_of_the_parts():
    inputs = _inputs()[:1]
    backward = SplitBackward(_seeded(Chain)(inputs[0], None).square().sum(), inputs)
    with _Products() as first:
        backward.input_gradients()
    with _Products() as second:
        backward.weight_gradients()
    assert (first.count, second.count) == (3, 3)  # three layers: their dx, then their dw


def _tripled(_module, _args, output):
    output.register_hook(lambda gradient: gradient * 3)


def test_hooks_of_weights_run_once_in_the_second_part_and_those_of_activations_once():
    module, inputs, seen = _seeded(Chain), _inputs()[:1], []
    for p in module.parameters():
        p.register_hook(lambda gradient: gradient * 2)
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    whole = _seeded(Chain)
    for chain in (module, whole):
        chain.layers[2].register_forward_hook(_tripled)
    whole(*_inputs()).square().sum().backward()
    backward = SplitBackward(module(inputs[0], None).square().sum(), inputs)
    backward.input_gradients()
    assert not seen
    backward.weight_gradients()
    assert len(seen) == len(set(map(id, seen))) == 6
    for one, other in zip(whole.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(other.grad, 2 * one.grad)


def test_layers_of_the_decoder():
    """pypar's own operators are autograd Functions: right, though they compute weight gradients in both parts."""
    config = DecoderConfig(
        vocab_size=17, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_size=8, d_ff=24
    )
    gradients = []
    for splits in (False, True):
        decoder = Decoder(config, seed=3)
        layers = list(decoder.layers.values())
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        cos, sin = decoder.rope_tables(torch.arange(5))
        y = x
        for layer in layers:
            y = layer(y, cos, sin, None, None)
        if splits:
            backward = SplitBackward(y.square().sum(), [x])
            (dx,) = backward.input_gradients()
            backward.weight_gradients()
        else:
            y.square().sum().backward()
            dx = x.grad
        gradients.append([dx, *(p.grad for layer in layers for p in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
