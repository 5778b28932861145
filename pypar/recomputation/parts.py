"""The modules of a model that are recomputed: which they are, and how their forward becomes a region's."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pypar.blocks import Block, inner_blocks
from pypar.ops.calls import has_listener
from pypar.ops.substitute import original_of, substitute
from pypar.ops.uncompiled import uncompiled
from pypar.recomputation.kept import Part
from pypar.recomputation.region import Region

_PART = "_pypar_recomputed"


def blocks_here(
    model: nn.Module, blocks: Iterable[str] | None, *, is_needed: bool = True
) -> list[tuple[int, str, nn.Module]]:
    """The modules of the blocks that this stage of a model has: (number of the block in the model, name, module).

    ValueError: no model, no names of modules; there are no blocks, and some are needed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, and is {model!r}")
    if isinstance(blocks, str):
        raise ValueError(f"blocks ({blocks!r}) must be a list of names of modules; give [{blocks!r}]")
    found = [Block(n, (n,)) for n in blocks] if blocks is not None else inner_blocks(model)
    if not found and is_needed:
        why = "are found" if blocks is None else "are named"
        raise ValueError(
            f"no blocks {why} in this {type(model).__name__}; give it a function blocks(), or pass the names of "
            "modules as blocks="
        )
    named = [(n, name, _module_of(model, name)) for n, block in enumerate(found) for name in block.modules]
    return [(n, name, module) for n, name, module in named if module is not None]


def _module_of(model: nn.Module, name: str) -> nn.Module | None:
    """None where another stage of a pipeline has it."""
    found: Any = model
    for part in name.split("."):
        if not isinstance(found, nn.Module) or part not in found._modules:
            raise ValueError(f"{type(model).__name__} has no module {name!r}; name one of its modules")
        found = found._modules[part]
    return found


def part_of(module: nn.Module) -> Part | None:
    """What a module is recomputed as; None where it is not."""
    return getattr(module, _PART, None)


def set_part(module: nn.Module, part: Part | None) -> None:
    """Let a module run as a part that is recomputed; None: as it was. ValueError: its forward is not its class's."""
    cls: Any = type(module)
    plain = original_of(cls, _members)
    if part is None:
        if plain is not None:
            module.__class__ = plain
            delattr(module, _PART)
        return
    if "forward" in vars(module):
        raise ValueError(
            f"another forward has been put on the module {part.name!r} over that of its class, as some hooks do, and "
            "would not be recomputed; call recompute before, or leave the module out of blocks"
        )
    setattr(module, _PART, part)
    if plain is None:
        module.__class__ = substitute(cls, _members)


def _members(plain: Any) -> dict[str, Any]:
    """A forward that is a region of recomputation."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: Part = getattr(self, _PART)
        function = functools.partial(plain.forward, self)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            return (_compiled if part.offload is None and part.planner is None else _uncompiled)(
                part, function, args, kwargs
            )
        return _run(part, function, args, kwargs)

    return {"forward": forward}


def _run(part: Part, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if has_listener():  # it is inside another one, which is computed again as a whole
        return function(*args, **kwargs)
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"{part.name} is recomputed in backward, which torch.func's transforms (grad, vmap, jvp, ...) do not "
            'have; use backward(), or pypar.recompute(model, "none")'
        )
    if part.planner is not None:
        return part.planner.run(part, function, args, kwargs)
    visit = None if part.offload is None else part.offload.visit(part.index)
    return Region(part, function, visit=visit).run(args, kwargs)


_uncompiled = uncompiled("what a block keeps is moved by its own forward and backward")(_run)


def _compiled(
    part: Part, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # pragma: no cover - it is traced
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    kept = part.kept
    if not kept.names:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    ops = [*kept.of_torch, *kept.of_pypar]
    contexts = functools.partial(create_selective_checkpoint_contexts, ops)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
