"""Random meshes and layouts for hypothesis, and what is left of a whole tensor by the plainest means."""

import itertools
import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some

from pypar.grid import TIED, Grid
from pypar.layout import Cut, Layout, Owner
from pypar.mesh_shape import mesh_grid

MOST_RANKS = 64
# Cores are shared with other tests: time says nothing of an example.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@some.composite
def grids(draw, most_ranks=MOST_RANKS):
    """Meshes of up to most_ranks simulated ranks, with refinements and a fold."""
    sizes, left = {}, most_ranks
    for name in draw(some.permutations(("pp", "dp", "cp", "tp"))):
        sizes[name] = draw(some.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if n <= left]))
        left //= sizes[name]
    split = {}
    for axis, names in (("tp", ("row", "column", "depth")), ("dp", ("replicate", "shard"))):
        if draw(some.booleans()):
            split[axis], rest = {}, sizes[axis]
            for name in names[:-1]:
                split[axis][name] = draw(some.sampled_from(divisors(rest)))
                rest //= split[axis][name]
            split[axis][names[-1]] = rest
    ep = draw(some.sampled_from(divisors(sizes["dp"] * sizes["cp"])))
    return mesh_grid(sizes, split, {"ep": (ep, ("dp", "cp"))})


@some.composite
def views(draw, grid: Grid):
    """Independent axes of a mesh, but for pp, in any order."""
    names = list(draw(some.sampled_from([("tp",), tuple(grid.split.get("tp", ("tp",)))])))
    dp = tuple(grid.split.get("dp", ("dp",)))
    names += draw(some.sampled_from([("dp", "cp"), (*dp, "cp"), ("edp", "ep")]))
    return draw(some.permutations(names))


@some.composite
def blocks(draw, length):
    edges = sorted(draw(some.lists(some.integers(0, length), max_size=3)))
    edges = [0, *edges, length]
    return tuple(end - start for start, end in itertools.pairwise(edges))


@some.composite
def layouts(draw, grid: Grid, shape=None, tied=None):
    """Cuts that meet, of uneven parts, in blocks, over products of axes; sometimes an owner of what they leave."""
    if shape is None:
        shape = tuple(draw(some.lists(some.integers(0, 13), max_size=3)))
    cuts, owner, seen = [], None, set()
    left = list(draw(views(grid)))
    while left and draw(some.integers(0, 4)):
        axes = tuple(left.pop() for _ in range(draw(some.integers(1, min(2, len(left))))))
        if shape and draw(some.integers(0, 3)):
            dim = draw(some.integers(0, len(shape) - 1))
            has_blocks = dim not in seen and draw(some.booleans())
            cuts.append(Cut(dim, axes, draw(blocks(shape[dim])) if has_blocks else ()))
            seen.add(dim)
        else:
            owner = Owner(axes, draw(some.integers(0, grid.size(*axes) - 1)))
            break
    tied = draw(some.booleans()) if tied is None else tied
    return Layout(shape, cuts, ("dp", "cp", TIED) if tied else ("dp", "cp"), owner)


def holders(layout, grid):
    """The ranks that have a parameter: those of a stage, or of the first and the last one."""
    last = grid.sizes["pp"] - 1
    stages = {0, last} if TIED in layout.sum_over else {last // 2}
    return [rank for rank in range(grid.num_ranks) if grid.coordinate(rank, "pp") in stages]


def whole_of(layout):
    return torch.arange(float(math.prod(layout.global_shape))).view(layout.global_shape) + 1


def cut_directly(whole, layout, grid, rank):
    """This rank's part, by torch.tensor_split, one cut after another."""
    for cut in layout.cuts:
        index, count = grid.coordinate(rank, *cut.axes), grid.size(*cut.axes)
        fused = whole.split(list(cut.blocks), cut.dim) if cut.blocks else (whole,)
        whole = torch.cat([each.tensor_split(count, cut.dim)[index] for each in fused], cut.dim)
    owner = layout.owner
    if owner is not None and grid.coordinate(rank, *owner.axes) != owner.rank:
        return whole.new_empty((0, *whole.shape[1:]))
    return whole
