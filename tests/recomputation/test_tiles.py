"""`pypar.tiled`: the same results and input gradients, one gradient a parameter, and less memory while it runs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pypar
from pypar.recomputation import SavedBytes

B, T, D, F = 2, 11, 8, 64


class FeedForward(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(D, F), nn.Linear(F, D, bias=False), nn.Dropout(dropout)
        self.unused, self.frozen = (
            nn.Parameter(torch.ones(3)),
            nn.Parameter(torch.ones(D), requires_grad=False),
        )

    def forward(self, x, scale=1.0):
        return self.down(self.drop(nn.functional.gelu(self.up(x)))) * self.frozen * scale


def seeded(**options):
    torch.manual_seed(1)
    return FeedForward(**options)


def outcome(module, **options):
    """(result, the input's gradient, the parameters')."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    module.zero_grad()
    torch.manual_seed(3)
    y = module(x * 1, **options)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y.detach(), x.grad, [p.grad for p in module.parameters()]


@pytest.mark.parametrize(("num_tiles", "dim"), [(2, 1), (4, 1), (50, 1), (2, 0), (3, -2)])
def test_results_are_those_without_tiles(num_tiles, dim):
    plain, tiles = seeded(), pypar.tiled(seeded(), num_tiles, dim)
    for options in ({}, {"scale": torch.tensor(0.5)}):
        (y, dx, gradients), (tiled_y, tiled_dx, tiled_gradients) = (
            outcome(m, **options) for m in (plain, tiles)
        )
        torch.testing.assert_close(tiled_y, y, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(tiled_dx, dx, rtol=1e-6, atol=1e-6)
        for a, b in zip(tiled_gradients, gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_each_row_has_the_bits_of_the_whole_where_products_are_by_rows():
    """A product that is a sum over one dimension, row by row, whatever the number of rows."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(F, D, generator=torch.Generator().manual_seed(4)))

        def forward(self, x):
            return (x.unsqueeze(-2) * self.weight).sum(-1).tanh()

    (y, dx, _), (tiled_y, tiled_dx, _) = (outcome(m) for m in (Rows(), pypar.tiled(Rows(), 3)))
    assert torch.equal(tiled_y, y) and torch.equal(tiled_dx, dx)


def test_a_parameter_gets_its_gradient_once_and_random_numbers_are_drawn_again():
    module, calls = pypar.tiled(seeded(dropout=0.5), 4), []
    for name, p in module.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    first = outcome(module)
    assert sorted(calls) == ["down.weight", "unused", "up.bias", "up.weight"] and module.unused.grad is None
    kept = outcome(seeded(dropout=0.5))[0] == 0
    assert not torch.equal(first[0] == 0, kept) or not kept.any()  # tiles draw in another order
    again = outcome(copy.deepcopy(module))
    for a, b in zip([*first[:2], *first[2]], [*again[:2], *again[2]], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that any operator returned, and the number of products."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # which would import the compiler

    def __init__(self):
        super().__init__()
        self.most = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.most = max(self.most, found.numel() if isinstance(found, torch.Tensor) else 0)
        self.products += func._opname in ("mm", "addmm")
        return found


def test_nothing_as_wide_as_the_whole_exists_and_the_input_alone_is_kept():
    module = pypar.tiled(seeded(), 11)
    x = torch.randn(B, T, D, requires_grad=True)
    with _Largest() as seen, SavedBytes(module) as saved:
        y = module(x)
        assert saved.num_bytes == x.nbytes
        y.sum().backward()
    assert seen.most == F * D < B * T * F  # a weight's gradient
    with torch.no_grad(), _Largest() as seen:
        module(x)
    assert seen.most == F * D < B * T * F  # the weight


def test_in_a_block_that_is_recomputed_forward_runs_no_third_time():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.feed_forward = pypar.RMSNorm(D), FeedForward()

        def forward(self, x):
            return x + self.feed_forward(self.norm(x))

    counts, gradients = [], []
    for policy in ("none", "full", "selective"):
        torch.manual_seed(1)
        model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
        for block in model["layers"]:
            pypar.tiled(block.feed_forward, 3)
        pypar.recompute(model, policy)
        x = torch.ones(B, T, D, requires_grad=True)
        with _Largest() as seen:
            model["layers"][1](model["layers"][0](x)).sum().backward()
        counts.append(seen.products)
        gradients.append([p.grad for p in model.parameters()])
    assert counts[0] == counts[1] == counts[2]
    for others in gradients[1:]:
        assert all(
            (a is None and b is None) or torch.equal(a, b) for a, b in zip(others, gradients[0], strict=True)
        )


def test_copies_the_way_back_and_refusals():
    module = pypar.tiled(seeded(), 3)
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(outcome(again)[0], outcome(module)[0]) and isinstance(again, FeedForward)
    assert type(pypar.tiled(module, 1)) is FeedForward
    x = torch.ones(B, T, D)
    for call, sentence in (
        (lambda: pypar.tiled(seeded(), 0), r"num_tiles \(0\) must be at least 1"),
        (
            lambda: pypar.tiled(nn.Flatten(), 2)(x),
            r"returned \(2, 48\) for a tile \(2, 6, 8\); it must act on each",
        ),
        (lambda: pypar.tiled(nn.LSTM(D, D), 2)(x), "returned a tuple for a tile"),
        (
            lambda: pypar.tiled(seeded(), 2)(x, scale=torch.ones(D, requires_grad=True)),
            "beside the first argument of",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    covered = seeded()
    covered.forward = covered.forward
    with pytest.raises(ValueError, match="another forward has been put on this FeedForward"):
        pypar.tiled(covered, 2)
    model = nn.ModuleDict({"only": pypar.tiled(seeded(), 2)})
    pypar.recompute(model, blocks=["only"])
    with pytest.raises(ValueError, match="this FeedForward is recomputed over its tiles"):
        pypar.tiled(model["only"], 1)
