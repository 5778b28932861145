"""`recompute`: the blocks of a model keep less than autograd would, and backward computes the rest again."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pypar.blocks import Block, inner_blocks
from pypar.ops.backend import unknown_name
from pypar.ops.calls import has_listener
from pypar.recomputation.config import POLICIES, RecomputeConfig, names_in
from pypar.recomputation.operators import COSTLY, check_names, overloads, pypar_overloads
from pypar.recomputation.region import Kept, Part, Region
from pypar.recomputation.tiles import tile_positions

_PART = "_pypar_recomputed"


def recompute(
    model: nn.Module,
    policy: str = "full",
    *,
    every: int = 1,
    ops: Iterable[str] | None = None,
    blocks: Iterable[str] | None = None,
    checksums: bool = False,
) -> nn.Module:
    """Let backward compute a model's blocks again, so that their activations are not kept. Returns the model.

        pypar.recompute(model)                             # of each block its inputs are kept
        pypar.recompute(model, "selective")                # and what attention and products of matrices returned
        pypar.recompute(model, "selective", ops=["attention"])
        pypar.recompute(model, "none")                     # as it was

    Gradients are the same bits. Parameters, their names, hooks and what `isinstance` says stay; blocks change their
    class in place. Call it after `pypar.parallelize`, and before torch.compile of the whole model or after
    `module.compile()` of blocks.

    policy   "full": a block's forward runs again in its backward, up to the last tensor that is needed, which leaves
             out the block's last product of matrices. "selective": it runs again without the operators of ``ops``,
             whose results were kept: norms, activations and rotary embeddings cost little. "none": all is kept
    every    a number n: every nth block only, from the first one on
    ops      names of operators, by default the costly ones and a router's choice; `pypar doctor` lists all
    blocks   names of modules; by default the model's own blocks() without the first and the last, else the members of
             its lists of modules of one class
    checksums   compares each tensor that is made again with a checksum of the first one, which finds a forward that
             does something else the second time. Shapes are compared always

    Random numbers that a block draws from torch's generators are the same both times; autocast and context managers
    such as `pypar.shard_context` too. A block inside a block that is recomputed adds nothing. With a backward in two
    parts (input gradients, then weights) a block is computed again once. Under torch.compile it is the compiler's own
    checkpoint. ValueError: an unknown policy or operator, ``ops`` without "selective", a model in which no blocks are
    found, a block whose forward was replaced on the object, torch.func's transforms.
    """
    kept = _kept(policy, ops, checksums)
    if every < 1:
        raise ValueError(f"every ({every}) must be at least 1: 1 for all blocks, 2 for every second one")
    found = [Block(n, (n,)) for n in blocks] if blocks is not None else inner_blocks(model)
    if blocks is None and not found and policy != "none":
        raise ValueError(
            f"no blocks are found in this {type(model).__name__}; give it a function blocks(), or pass the names of "
            "modules as blocks="
        )
    for index, block in enumerate(found):
        chosen = kept if index % every == 0 else None
        for name in block.modules:
            module = _module_of(model, name)
            if module is not None:
                _set(module, name, chosen)
    return model


def _kept(policy: str, ops: Iterable[str] | None, checksums: bool) -> Kept | None:
    """None: all is."""
    if policy not in POLICIES:
        raise ValueError(unknown_name("policy", policy, POLICIES, "recompute: "))
    if ops is not None and policy != "selective":
        raise ValueError(
            f'ops names what policy "selective" keeps, and the policy is {policy!r}; leave ops out'
        )
    if policy == "none":
        return None
    if policy == "full":
        return Kept(checks=checksums)
    names = check_names(COSTLY if ops is None else ops)
    return Kept(names, overloads(names), pypar_overloads(names), checksums)


def _module_of(model: nn.Module, name: str) -> nn.Module | None:
    """None where another stage of a pipeline has it."""
    found: Any = model
    for part in name.split("."):
        if not isinstance(found, nn.Module) or part not in found._modules:
            raise ValueError(f"{type(model).__name__} has no module {name!r}; name one of its modules")
        found = found._modules[part]
    return found


def _set(module: nn.Module, name: str, kept: Kept | None) -> None:
    cls: Any = type(module)
    is_recomputed = "_pypar_plain" in vars(cls)
    if kept is None:
        if is_recomputed:
            module.__class__ = cls._pypar_plain
            delattr(module, _PART)
        return
    if "forward" in vars(module):
        raise ValueError(
            f"another forward has been put on the module {name!r} over that of its class, as some hooks do, and "
            "would not be recomputed; call recompute before, or leave the module out of blocks"
        )
    setattr(module, _PART, Part(name, kept, list(module.modules())))
    if not is_recomputed:
        module.__class__ = recomputed_class(cls)


def _forward(plain: type[nn.Module]) -> Any:
    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: Part = getattr(self, _PART)
        function = functools.partial(plain.forward, self)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            return _compiled(function, part.kept, args, kwargs)
        if has_listener():  # it is inside another one, which is computed again as a whole
            return function(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                f"{part.name} is recomputed in backward, which torch.func's transforms (grad, vmap, jvp, ...) do not "
                'have; use backward(), or pypar.recompute(model, "none")'
            )
        return Region(part, function).run(args, kwargs)

    return forward


@functools.cache
def recomputed_class(plain: Any) -> Any:
    """A subclass of a module's class, of the same name, whose forward is a region of recomputation."""
    members = {
        "forward": _forward(plain),
        "_pypar_plain": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__reduce_ex__": lambda self, protocol: (_empty, (plain,), vars(self)),
        "computes_as": getattr(plain, "computes_as", plain),  # what pypar.parallel asks of a subclass
    }
    return type(plain.__name__, (plain,), members)


def _empty(plain: Any) -> Any:
    """An empty instance, for copies and pickles: the class itself stands in no module."""
    return object.__new__(recomputed_class(plain))


def _compiled(
    function: Any, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # pragma: no cover - it is traced
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if not kept.names:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    ops = [*kept.of_torch, *kept.of_pypar]
    contexts = functools.partial(create_selective_checkpoint_contexts, ops)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def recomputed(model: nn.Module) -> Sequence[str]:
    """The names of the modules that backward computes again."""
    return [name for name, module in model.named_modules() if hasattr(module, _PART)]


def recompute_as(model: nn.Module, config: RecomputeConfig) -> None:
    """`tiled` and `recompute` as a run's configuration says."""
    if config.tiles > 1:
        tile_positions(model, config.tiles)
    if config.policy != "none":
        ops = names_in(config.ops) or None
        recompute(model, config.policy, every=config.every, ops=ops, checksums=config.checksums)
