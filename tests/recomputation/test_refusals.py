"""What `pypar.recompute` refuses, and forwards that do something else when backward runs them again."""

import random

import pytest
import torch
from torch import nn

import pypar
from tests.recomputation.test_recompute import WIDTH, Model, numbers, outcome, seeded


class Growing(nn.Linear):
    """A cache that grows, as those of keys and values do."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.cache = []

    def forward(self, given, *, scale):
        self.cache.append(given[0].detach())
        return super().forward(torch.cat(self.cache)).tanh().sum(0, keepdim=True) + given[0], 0


class OfPython(nn.Linear):
    """A random number that torch does not know of."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, given, *, scale):
        return torch.exp(super().forward(given[0] * random.random())), 0


class Fewer(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, given, *, scale):
        self.runs += 1
        return super().forward(given[0]).tanh().exp() if self.runs == 1 else given[0] * 2, 0


@pytest.mark.parametrize(
    ("layer", "checksums", "sentence"),
    [
        (
            Growing,
            False,
            r"layers.2 computed \(24, 8\) float32 on cpu in backward where its forward had \(12, 8\)",
        ),
        (
            OfPython,
            True,
            r"layers.2 computed another tensor \(12, 8\) float32 on cpu in backward than its forward",
        ),
        (
            Fewer,
            False,
            r"layers.2 saved \d tensors in backward where its forward saved \d; a forward that is recomp",
        ),
    ],
)
def test_a_forward_that_differs_the_second_time_is_refused(layer, checksums, sentence):
    model = pypar.recompute(seeded(lambda: Model(layer)), checksums=checksums)
    with pytest.raises(RuntimeError, match=sentence):
        outcome(model)


def test_an_input_that_is_written_into_is_refused():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            hidden = self.layers[0](x) + 1
            out = self.layers[1](hidden)
            hidden.add_(1)
            return out.sum()

    with pytest.raises(
        RuntimeError, match=r"a tensor \(2, 6, 8\) that backward needs was written into after"
    ):
        outcome(pypar.recompute(Writing()))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pypar.recompute(Model(), "fully"), "recompute: unknown policy 'fully'.*did you mean 'full'"),
        (
            lambda: pypar.recompute(Model(), "selective", ops=["atention"]),
            "recompute, ops: .*'atention'.*attention",
        ),
        (
            lambda: pypar.recompute(Model(), ops=["attention"]),
            'ops names what policy "selective" keeps, and .*full',
        ),
        (lambda: pypar.recompute(Model(), None), "recompute: unknown policy None, known are none, full"),
        (lambda: pypar.recompute(Model(), every=0), r"every \(0\) must be a whole number of at least 1"),
        (lambda: pypar.recompute(Model(), every=1.5), r"every \(1.5\) must be a whole number"),
        (lambda: pypar.recompute(Model(), offload=True), r"offload \(True\) must be a .*Offload or None"),
        (lambda: pypar.recompute(None), "model must be a torch.nn.Module, and is None"),
        (lambda: pypar.recompute(Model(), blocks="layers.0"), r"must be a list of names .*\['layers.0'\]"),
        (lambda: pypar.recompute(Model(), blocks=[]), "no blocks are named in this Model"),
        (
            lambda: pypar.recompute(nn.Linear(2, 2)),
            "no blocks are found in this Linear; give it a function blocks",
        ),
        (
            lambda: pypar.recompute(Model(), blocks=["layer.0"]),
            "Model has no module 'layer.0'; name one of its",
        ),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_forward_on_the_object_and_transforms_are_refused():
    model = Model()
    model.layers[0].forward = model.layers[0].forward
    with pytest.raises(
        ValueError, match="another forward has been put on the module 'layers.0' over that of its"
    ):
        pypar.recompute(model)
    model = pypar.recompute(Model())
    with pytest.raises(
        ValueError, match=r"layers.0 is recomputed in backward, which torch.func's transforms"
    ):
        torch.func.grad(model)(numbers(2, 6, WIDTH))
