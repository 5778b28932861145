"""Kept results that are written into: the operator runs again, or an error says so, but no gradient is wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pypar
from tests.recomputation.test_recompute import WIDTH, _Products, assert_same, seeded


class InPlace(nn.Module):
    """A bias that is added to a product, an activation in place, a router's weights that are made to add up to 1."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.router = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.own = pypar.models.Linear(WIDTH, WIDTH)
        nn.init.ones_(self.own.weight)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
        weights /= weights.sum(-1, keepdim=True)
        y = self.up(x)
        y += self.bias
        F.relu_(y)
        z = self.own(y).mul_(2)
        return x + self.down(z.exp().tanh()) * weights.gather(-1, chosen % 2).sum(-1, keepdim=True)


class Returned(nn.Module):
    """Its result is a product's, which is kept as another tensor is computed from it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.first(x)
        return y, y.exp().tanh()


class Layers(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))


def outcome(model, x):
    for layer in model.layers:
        x = layer(x)
    x.square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("ops", [None, ["linear"], ["topk"]], ids=str)
def test_a_result_that_its_block_writes_into_is_computed_again(ops):
    x = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)
    model = pypar.recompute(seeded(lambda: Layers(InPlace)), "selective", ops=ops, checksums=True)
    for _ in range(2):
        model.zero_grad()
        assert_same(outcome(model, x), outcome(seeded(lambda: Layers(InPlace)), x))


def test_a_result_that_others_write_into_is_an_error():
    model = pypar.recompute(seeded(lambda: Layers(Returned)), "selective")
    y, z = model.layers[0](torch.ones(5, WIDTH))
    y += 1
    with pytest.raises(
        RuntimeError, match=r"a tensor \(5, 8\) that backward needs was written into after the forward"
    ):
        z.sum().backward()
    y, z = model.layers[0](torch.ones(5, WIDTH))
    (y + z).sum().backward()


def test_a_block_that_writes_into_its_input_is_an_error():
    class IntoInput(nn.Linear):
        def forward(self, x):
            return x.add_(super().forward(x).tanh().exp())

    model = pypar.recompute(Layers(lambda: IntoInput(WIDTH, WIDTH)))
    with pytest.raises(
        RuntimeError, match=r"a tensor \(5, 8\) that backward needs was written into after the forward"
    ):
        outcome(model, torch.ones(5, WIDTH))


class Reused(nn.Module):
    """Memory that was written into, or was an operator's input, is given to other tensors of the same size."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), pypar.RMSNorm(WIDTH)

    def forward(self, x):
        for _ in range(3):
            gone = x * 2
            gone.add_(1)
            del gone
            x = self.first(x)
        raised = x + 1
        y = self.norm(raised)
        del raised
        for _ in range(3):
            y = (y * 3).exp().tanh()
        return y


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_memory_that_is_used_again_is_not_taken_for_what_was_in_it(policy):
    x = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)
    model = pypar.recompute(seeded(lambda: Layers(Reused)), policy, checksums=True)
    found = outcome(model, x)
    assert_same(found, outcome(seeded(lambda: Layers(Reused)), x))
    if policy == "selective":
        layer = model.layers[0]
        with _Products() as products:
            y = layer(x.requires_grad_())
            before = products.counts["mm"]
            y.sum().backward()
        assert products.counts["mm"] == before + 6  # two gradients each: no product runs again
