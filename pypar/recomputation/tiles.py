"""`tiled`: a module that acts on each position by itself runs over some positions after the others.

What lies between its input and its output, the widest activations of a transformer, then exists for one tile at a time,
forward and backward (Arctic Long Sequence Training, arXiv 2506.13996).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.ops.calls import called
from pypar.ops.substitute import original_of, substitute
from pypar.ops.uncompiled import uncompiled
from pypar.recomputation.environment import Environment

_TILING = "_pypar_tiling"


@dataclass(frozen=True)
class _Tiling:
    num_tiles: int
    dim: int


def tiled(module: nn.Module, num_tiles: int, dim: int = 1) -> nn.Module:
    """Let a module run over its input in tiles along a dimension. Returns the module; 1 tile: as it was.

        for layer in model.layers:
            pypar.tiled(layer.feed_forward, 8)      # x [B, T, D]: T in eight parts

    Only the input is kept for backward, which computes one tile after the other again and adds their gradients of a
    parameter up, in fp32, before autograd gets their sum: hooks and reductions see a parameter once. In a block that
    is recomputed too the module's forward does not run a third time.

    The module must act on each position along ``dim`` by itself, like a feed-forward part: its result and the input's
    gradient are then what they are without tiles, to the bit where a product of matrices of fewer rows gives the same
    bits. Gradients of parameters differ by the order of a sum. Tensors beside the first argument are given to each tile
    whole, and have no gradient. ValueError: less than one tile; a result that is no tensor of as many positions; a
    tensor that needs a gradient beside the first argument. It differentiates once.
    """
    if num_tiles < 1:
        raise ValueError(f"num_tiles ({num_tiles}) must be at least 1")
    cls: Any = type(module)
    untiled = original_of(cls, _members)
    if untiled is not None:
        module.__class__ = cls = untiled
        delattr(module, _TILING)
    elif hasattr(module, _TILING):
        raise ValueError(
            f'this {cls.__name__} is recomputed over its tiles; call pypar.recompute(model, "none") before'
        )
    if num_tiles > 1:
        if "forward" in vars(module):
            raise ValueError(
                f"another forward has been put on this {cls.__name__} over that of its class, as some hooks do, and "
                "would not run in tiles; call tiled before"
            )
        setattr(module, _TILING, _Tiling(num_tiles, dim))
        module.__class__ = substitute(cls, _members)
    return module


def _members(plain: Any) -> dict[str, Any]:
    """A forward that runs in tiles."""

    @functools.wraps(plain.forward)
    @uncompiled("its backward runs the module's own forward and backward")
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tiling: _Tiling = getattr(self, _TILING)
        run = functools.partial(_given, functools.partial(plain.forward, self), args, kwargs)
        if not torch.is_grad_enabled():
            return _in_tiles(run, x, tiling, [])
        for other in (*args, *kwargs.values()):
            if isinstance(other, Tensor) and other.requires_grad:
                raise ValueError(
                    f"a tensor {tuple(other.shape)} beside the first argument of a tiled {plain.__name__} needs a "
                    "gradient, which it would not get; pass it as a part of the first, or detach it"
                )
        parameters = [p for p in self.parameters() if p.requires_grad]
        return _Tiled.apply(run, tiling, x, *parameters)  # type: ignore[no-untyped-call]

    return {"forward": forward}


def _given(function: Callable[..., Tensor], args: Any, kwargs: Any, x: Tensor) -> Tensor:
    return function(x, *args, **kwargs)


def _in_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, tiling: _Tiling, environments: list[Environment]
) -> Tensor:
    """The results of all tiles, side by side; adds what each tile depended on beside x."""
    whole: Tensor | None = None
    first = 0
    for tile in x.tensor_split(tiling.num_tiles, tiling.dim):
        environments.append(Environment.now([x]))
        found = run(tile)
        environments[-1].forget_unused()
        count = tile.shape[tiling.dim]
        if not isinstance(found, Tensor) or found.dim() <= tiling.dim or found.shape[tiling.dim] != count:
            what = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"a tiled module returned {what} for a tile {tuple(tile.shape)}; it must act on each position along "
                f"dim {tiling.dim} by itself and return a tensor of as many"
            )
        if whole is None:
            shape = list(found.shape)
            shape[tiling.dim] = x.shape[tiling.dim]
            whole = found.new_empty(shape)
        whole.narrow(tiling.dim, first, count).copy_(found)
        first += count
    assert whole is not None
    return whole


class _Tiled(Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], tiling: _Tiling, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.run, ctx.tiling, ctx.parameters, ctx.environments = run, tiling, parameters, []
        ctx.save_for_backward(x)
        return called("tiled", (x,), lambda: _in_tiles(run, x, tiling, ctx.environments))

    @staticmethod
    @uncompiled("it runs the module's own forward and backward")
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dim, num_tiles = ctx.tiling.dim, ctx.tiling.num_tiles
        needs_x = ctx.needs_input_grad[2]
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        dx = torch.empty_like(x) if needs_x else None
        first = 0
        tiles = zip(
            x.tensor_split(num_tiles, dim), dout.tensor_split(num_tiles, dim), ctx.environments, strict=True
        )
        for tile, dtile, environment in tiles:
            tile = tile.detach().requires_grad_(needs_x)
            with torch.enable_grad(), environment.restored():
                out = ctx.run(tile)
            wanted = [*([tile] if needs_x else []), *ctx.parameters]
            found = list(torch.autograd.grad(out, wanted, dtile, allow_unused=True))
            if dx is not None:
                part, gradient = dx.narrow(dim, first, tile.shape[dim]), found.pop(0)
                part.zero_() if gradient is None else part.copy_(gradient)
            sums = [_added(total, gradient) for total, gradient in zip(sums, found, strict=True)]
            first += tile.shape[dim]
        gradients = [
            None if total is None else total.to(p.dtype)
            for total, p in zip(sums, ctx.parameters, strict=True)
        ]
        return None, None, dx, *gradients


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """In fp32 at least: many tiles of small sums in 16 bits would lose what the whole's product does not."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)


def tile_positions(model: nn.Module, num_tiles: int) -> Sequence[str]:
    """`tiled` for the modules of a model that it says act on each position by itself; returns their names.

    A model says it by name patterns, its attribute ``position_wise``. ValueError where it does not.
    """
    from fnmatch import fnmatchcase

    patterns = getattr(model, "position_wise", None)
    if not patterns:
        raise ValueError(
            f"a {type(model).__name__} does not say which of its modules act on each position by itself; give it an "
            'attribute position_wise, patterns of names like ("layers.*.feed_forward",), or use recompute.tiles=1'
        )
    found = [
        name for name, _ in model.named_modules() if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    for name in found:
        tiled(model.get_submodule(name), num_tiles)
    return found
