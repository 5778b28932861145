"""Models and losses of the ways in which people use a model, each by its name."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.data_parallel.zero.trees import WIDTH, batch

Pair = namedtuple("Pair", ("hidden", "other"))


@dataclass
class Result:
    hidden: Tensor
    other: Tensor | None = None


class Block(nn.Module):
    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())


class Model(nn.Module):
    """x [B, WIDTH] -> [B, WIDTH] through three blocks; what a program changes, it says in its class."""

    block: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.block() for _ in range(3))
        self.after = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = self.through(layer, x)
        return self.after(x)

    def through(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def loss(self, x: Tensor, target: Tensor, step: int) -> Tensor:
        return functional.mse_loss(self(x), target)


class ReturnsDict(Model):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return {"states": [Block.forward(self, x), None], "name": "block"}

    def through(self, layer, x):
        return layer(x)["states"][0]


class ReturnsNamedTuple(Model):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return Pair(Block.forward(self, x), x.detach())

    def through(self, layer, x):
        return layer(x).hidden


class ReturnsDataclass(Model):
    class block(Block):  # noqa: N801
        def forward(self, x, *, options):
            return Result(Block.forward(self, x) * options["scale"])

    def through(self, layer, x):
        return layer(x, options={"scale": 2.0}).hidden


class AuxiliaryLosses(Model):
    """Each block has a loss of its own beside its output, as routers have."""

    class block(Block):  # noqa: N801
        def forward(self, x):
            hidden = Block.forward(self, x)
            return hidden, self.first(x).square().mean()

    def through(self, layer, x):
        x, own = layer(x)
        self.own_losses.append(own)
        return x

    def loss(self, x, target, step):
        self.own_losses = []
        return functional.mse_loss(self(x), target) + 0.1 * sum(self.own_losses)


class FirstBlockIsNeededLast(Model):
    """As the two halves of a U-Net."""

    def forward(self, x):
        first = self.layers[0](self.before(x))
        return self.after(self.layers[2](self.layers[1](first)) + first * first)


class BlocksBesideEachOther(Model):
    def forward(self, x):
        x = self.before(x)
        return self.after(self.layers[0](x) * self.layers[1](x) + self.layers[2](x))


class TwoForwards(Model):
    def loss(self, x, target, step):
        return functional.mse_loss(self(x), self(target))


class TwoForwardsOneOfThemWithoutGradient(Model):
    def loss(self, x, target, step):
        result = self(x)
        with torch.no_grad():
            wanted = self(target)
        return functional.mse_loss(result, wanted)


class AnotherOrderEachStep(Model):
    def loss(self, x, target, step):
        x = self.before(x)
        for index in ((0, 1, 2), (2, 0, 1), (1, 1, 0), (2,))[step % 4]:
            x = self.layers[index](x)
        return functional.mse_loss(self.after(x), target)

    def forward(self, x, target, step):
        return self.loss(x, target, step)


class ChangesInPlace(Model):
    def through(self, layer, x):
        return layer(x).add_(1.0).relu_()


class RecomputesPartOfABlock(Model):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return x + self.second(checkpoint(self.first, x, use_reentrant=False).tanh())


class RecomputesTwoBlocksAtOnce(Model):
    def forward(self, x):
        x = self.before(x)
        both = nn.Sequential(self.layers[0], self.layers[1])
        return self.after(self.layers[2](checkpoint(both, x, use_reentrant=False)))


class RecomputesReentrantly(Model):
    def through(self, layer, x):
        return checkpoint(layer, x, use_reentrant=True)


class RecomputesWithDropout(Model):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return checkpoint(
                lambda y: functional.dropout(Block.forward(self, y), 0.3), x, use_reentrant=False
            )

    def loss(self, x, target, step):
        torch.manual_seed(int(x.abs().sum() * 1e6))
        return super().loss(x, target, step)


class FrozenBlock(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].requires_grad_(False)
        self.layers[2].first.requires_grad_(False)


class OnlyAnAdapterIsTrained(Model):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.layers[1].second.requires_grad_()


class HasBuffers(Model):
    class block(Block):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            return Block.forward(self, self.norm(x))


class TransposedWeights(Model):
    """Parameters that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.first.weight = nn.Parameter(layer.first.weight.detach().t().contiguous().t())


class ParametersOfOneMemory(Model):
    """As the weights of torch's recurrent layers are."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            flat = torch.cat([layer.first.weight.detach().flatten(), layer.first.bias.detach()])
            weight, bias = flat.split([7 * WIDTH, 7])
            layer.first.weight, layer.first.bias = nn.Parameter(weight.view(7, WIDTH)), nn.Parameter(bias)


class Recurrent(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(WIDTH, WIDTH) for _ in range(2))

    def through(self, layer, x):
        return layer(x)[0]


class TiedOverBlocks(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].first.weight = self.layers[0].first.weight
        self.after.weight = self.before.weight


class OneModuleTwice(Model):
    """The same module stands at two places of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(self.layers[0])


class FunctionsInsideABlock(Model):
    """A block calls its modules' parameters, not its modules."""

    class block(Block):  # noqa: N801
        def forward(self, x):
            hidden = functional.linear(x, self.first.weight * 2, self.first.bias)
            return torch.addmm(x, hidden.tanh(), self.second.weight.t())


class PenaltyOfWeights(Model):
    """The loss reads parameters of the root beside the forward of the model."""

    def forward(self, x):
        return super().forward(x) + self.before.weight.square().sum() + self.after.weight.norm()


PROGRAMS: dict[str, type[Model]] = {
    made.__name__: made for made in Model.__subclasses__() if made.__module__ == __name__
}


@dataclass(frozen=True)
class Program:
    """A model of `PROGRAMS` by its name, and its loss."""

    name: str

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return PROGRAMS[self.name]()

    def loss(self, model: nn.Module, rank: int, step: int, microbatch: int) -> Tensor:
        x, target = batch(rank, step, microbatch)
        if self.name == "AnotherOrderEachStep":
            return model(x, target, step)
        return model.loss(x, target, step)
