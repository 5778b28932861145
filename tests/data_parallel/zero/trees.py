"""Random trees of modules, as descriptions that travel to ranks, and strategies of hypothesis that draw them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 5


@dataclass(frozen=True)
class Leaf:
    """A module of one parameter; of no dims, of one (one element or `WIDTH`), or of more, the last of them `WIDTH`."""

    shape: tuple[int, ...] = (WIDTH, WIDTH)
    dtype: torch.dtype = torch.float32
    is_trained: bool = True
    is_used: bool = True
    of: int | None = None  # its parameter is that of an earlier leaf, counted modulo how many there are


@dataclass(frozen=True)
class Group:
    """Modules behind each other. recompute: "no", "inside" its forward or "outside", around the call of the module."""

    members: tuple[Leaf | Group, ...] = (Leaf(),)
    recompute: str = "no"


@dataclass(frozen=True)
class Tree:
    """What is before a list of blocks, the blocks, what is after them, and in which order blocks are called."""

    blocks: tuple[Group, ...]
    calls: tuple[int, ...] | None = None  # None: each once
    before: Group = field(default_factory=Group)
    after: Group = field(default_factory=Group)

    def model(self) -> TreeModule:
        return TreeModule(self)

    def loss(self, model: nn.Module, rank: int, step: int, microbatch: int) -> Tensor:
        """Each rank, step and microbatch has data of its own."""
        x, target = batch(rank, step, microbatch)
        return functional.mse_loss(model(x), target)


class LeafModule(nn.Module):
    def __init__(self, leaf: Leaf, made: list[nn.Parameter]) -> None:
        super().__init__()
        self.leaf = leaf
        if leaf.of is not None and made:
            self.weight = made[leaf.of % len(made)]
        else:
            seeded = torch.Generator().manual_seed(len(made))
            value = torch.randn(leaf.shape, generator=seeded) / 4
            self.weight = nn.Parameter(value.to(leaf.dtype), requires_grad=leaf.is_trained)
            made.append(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.leaf.is_used:
            return x
        narrow = x.to(self.weight.dtype)
        if self.weight.dim() < 2:
            return (narrow * (1 + self.weight)).to(x.dtype)
        matrix = self.weight.view(-1, WIDTH)
        return x + (functional.linear(narrow, matrix).tanh() @ matrix).to(x.dtype)


class GroupModule(nn.Module):
    def __init__(self, group: Group, made: list[nn.Parameter]) -> None:
        super().__init__()
        self.recompute = group.recompute
        self.members = nn.ModuleList(
            LeafModule(each, made) if isinstance(each, Leaf) else GroupModule(each, made)
            for each in group.members
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "inside":
            return checkpoint(self._through, x, use_reentrant=False)
        return self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        for member in self.members:
            x = call(member, x)
        return x


def call(module: nn.Module, x: Tensor) -> Tensor:
    if getattr(module, "recompute", "") == "outside":
        return checkpoint(module, x, use_reentrant=False)
    return module(x)


class TreeModule(nn.Module):
    """x [B, WIDTH] -> [B, WIDTH]"""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        made: list[nn.Parameter] = []
        self.calls = range(len(tree.blocks)) if tree.calls is None else tree.calls
        self.before = GroupModule(tree.before, made)
        self.layers = nn.ModuleList(GroupModule(block, made) for block in tree.blocks)
        self.after = GroupModule(tree.after, made)

    def forward(self, x: Tensor) -> Tensor:
        x = call(self.before, x)
        for index in self.calls:
            x = call(self.layers[index], x)
        return call(self.after, x)


def batch(rank: int, step: int, microbatch: int) -> Tensor:
    """Inputs and targets, [2, 3, WIDTH], of one microbatch of a rank."""
    seeded = torch.Generator().manual_seed(10_000 * step + 100 * rank + microbatch)
    return torch.randn(2, 3, WIDTH, generator=seeded)


HALF = torch.bfloat16
SHAPES = (
    (WIDTH, WIDTH),
    (7, WIDTH),
    (3, WIDTH),
    (1, WIDTH),
    (0, WIDTH),
    (3, 2, WIDTH),
    (WIDTH,),
    (1,),
    (),
)


def everything(recompute: str = "no") -> Tree:
    """Every kind of parameter in three blocks, one of which is called twice and another never."""
    group = partial(Group, recompute=recompute)
    odd = (Leaf((7, WIDTH)), Leaf((1, WIDTH)), Leaf(()), Leaf(is_trained=False))
    mixed = (
        Leaf((3, WIDTH), HALF),
        Group((Leaf((0, WIDTH)), Leaf((WIDTH,)), Leaf(is_used=False)), recompute),
    )
    shared = (Leaf((3, 2, WIDTH)), Leaf(of=1), Leaf((1,)), Leaf(of=-1))
    blocks = (group(odd), group(mixed), group(shared), group((Leaf((3, WIDTH)),)))
    return Tree(blocks, calls=(0, 1, 2, 1), after=Group((Leaf(), Leaf((WIDTH,), HALF))))


@some.composite
def leaves(draw: some.DrawFn) -> Leaf:
    return Leaf(
        draw(some.sampled_from(SHAPES)),
        draw(some.sampled_from([torch.float32, torch.float32, HALF])),
        draw(some.sampled_from([True, True, True, False])),
        draw(some.sampled_from([True, True, True, False])),
        draw(some.sampled_from([None, None, None, 0, -1, 3])),
    )


@some.composite
def groups(draw: some.DrawFn, depth: int = 2) -> Group:
    member = some.one_of(leaves(), groups(depth - 1)) if depth else leaves()
    members = draw(some.lists(member, max_size=3))
    return Group(tuple(members), draw(some.sampled_from(["no", "no", "inside", "outside"])))


@some.composite
def trees(draw: some.DrawFn) -> Tree:
    """The first leaf is trained and used, so that there is always something to learn."""
    blocks = draw(some.lists(groups(), min_size=1, max_size=4))
    every = list(range(len(blocks)))
    calls = draw(
        some.one_of(some.none(), some.permutations(every), some.lists(some.sampled_from(every), max_size=5))
    )
    before = draw(groups(1))
    before = Group((Leaf(draw(some.sampled_from(SHAPES[:4]))), *before.members), before.recompute)
    return Tree(tuple(blocks), None if calls is None else tuple(calls), before, draw(groups(1)))
