"""A model as a list of blocks: what pipeline stages, recomputation and offload act on.

A model says what its blocks are by a function `blocks()`, and its forward runs those that it still has, so that a stage
of a pipeline is the model itself without the blocks of the others. Names of parameters stay those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from pypar.grid import TIED
from pypar.layout import layout_of, set_layout

_NAMES = "_pypar_names_of_whole_model"


class Block(NamedTuple):
    """One step of a model's forward: its name, and the names of the modules whose parameters belong to it."""

    name: str
    modules: tuple[str, ...]


def blocks_of(model: nn.Module) -> list[Block]:
    """The model's blocks in the order of its forward. ValueError for a model that does not say what they are."""
    say: Any = getattr(model, "blocks", None)
    if not callable(say):
        raise ValueError(
            f"a {type(model).__name__} does not say what its blocks are; give it a function blocks() that returns a "
            "list of pypar.blocks.Block, and a forward that runs those whose modules are not None, or use pp=1"
        )
    return list(say())


def found_blocks(model: nn.Module) -> list[Block]:
    """The model's blocks: those that it says, else the members of its outermost ModuleLists of two or more modules of
    one class, else none.
    """
    if callable(getattr(model, "blocks", None)):
        return blocks_of(model)
    return [Block(name, (name,)) for name in _members_of_lists(model, "")]


def _members_of_lists(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        # A class that stands in for another one, as of blocks that are recomputed, counts as that.
        if (
            len(members) > 1
            and len({getattr(member, "computes_as", type(member)) for member in members}) == 1
        ):
            first = {id(member): index for index, member in reversed(list(enumerate(members)))}
            yield from (f"{prefix}{name}.{index}" for index in sorted(first.values()))
        else:
            yield from _members_of_lists(child, f"{prefix}{name}.")


def inner_blocks(model: nn.Module) -> list[Block]:
    """`found_blocks` without the first and the last of a model that says its blocks: an embedding and a head."""
    found = found_blocks(model)
    return found[1:-1] if callable(getattr(model, "blocks", None)) else found


def is_here(model: nn.Module, name: str) -> bool:
    """Whether a module of the whole model is in this stage of it."""
    found: Any = model
    for part in name.split("."):
        found = found._modules.get(part) if isinstance(found, nn.Module) else None
    return found is not None


def stage_blocks(blocks: Sequence[Block], num_stages: int, stage: int) -> Sequence[Block]:
    """The blocks of one pipeline stage, all but the first and the last one as evenly as possible.

    The first stage also holds the first block (an embedding), the last one the last (a head): a remainder goes to the
    stages in between first. ValueError where a stage would be left without one of the blocks between.
    """
    inner = len(blocks) - 2
    if inner < num_stages:
        raise ValueError(
            f"a model of {inner} layers has too few for {num_stages} pipeline stages of at least one each; use "
            f"pp <= {max(inner, 1)}"
        )
    base, extra = divmod(inner, num_stages)
    order = sorted(range(num_stages), key=lambda s: (s == num_stages - 1, s == 0, s))
    sizes = [base + (order.index(s) < extra) for s in range(num_stages)]
    start, end = 1 + sum(sizes[:stage]), 1 + sum(sizes[: stage + 1])
    return blocks[0 if stage == 0 else start : len(blocks) if stage == num_stages - 1 else end]


def check_stages(model: nn.Module, num_stages: int) -> None:
    """ValueError, the same for every stage, where a whole model cannot be cut into so many.

    Stages other than the first and the last one cannot share parameters. A trained parameter that is in no block would
    be on every stage, each of which would train it by its own part of the gradient; under a second name that is in no
    block it would stay on stages that do not train it.
    """
    blocks = blocks_of(model)
    stages = [stage_blocks(blocks, num_stages, stage) for stage in range(num_stages)]
    for stage in range(1, num_stages - 1):
        if shared := _shared(model, blocks, stages[stage]):
            raise ValueError(
                f"stage {stage} of {num_stages} shares {', '.join(sorted(shared.values()))} with another one; only the "
                "first and the last stage can share parameters"
            )
    if num_stages > 1:
        _check_inside(model, blocks, num_stages)


def _check_inside(model: nn.Module, blocks: Sequence[Block], num_stages: int) -> None:
    """ValueError where a trained parameter has a name that is in no block."""
    prefixes = tuple(f"{module}." for block in blocks for module in block.modules)
    named = list(model.named_parameters(remove_duplicate=False))
    inside = {id(p): n for n, p in reversed(named) if n.startswith(prefixes)}
    outside = {n: p for n, p in named if p.requires_grad and not n.startswith(prefixes)}
    if alone := [n for n, p in outside.items() if id(p) not in inside]:
        raise ValueError(
            f"no block of this {type(model).__name__}'s blocks() has {', '.join(alone)}, which each of {num_stages} "
            "pipeline stages would train by itself; put it into a module of a block, or use pp=1"
        )
    for name, parameter in outside.items():
        raise ValueError(
            f"{name} is {inside[id(parameter)]} under another name, which no block of this {type(model).__name__}'s "
            f"blocks() has: it would stay on each of {num_stages} pipeline stages and be trained on one; put it into a "
            "module of a block, or use pp=1"
        )


def keep_stage(model: nn.Module, num_stages: int, stage: int) -> None:
    """Take from the model, in place, all blocks but those of one pipeline stage.

    A parameter that two blocks share stays on both stages: its gradient is summed over them ("tied"), and its name is
    the first block's. ValueError as `check_stages` says.
    """
    check_stages(model, num_stages)
    blocks = blocks_of(model)
    kept = stage_blocks(blocks, num_stages, stage)
    shared = _shared(model, blocks, kept)
    for block in blocks:
        for name in block.modules if block not in kept else ():
            _take_out(model, name)
    for name in shared:
        owner = model.get_submodule(name.rpartition(".")[0])
        _sum_over_both(owner, name.rpartition(".")[2])
    setattr(model, _NAMES, shared)


def shares_across_stages(model: nn.Module, num_stages: int) -> bool:
    """Whether the first of so many pipeline stages has parameters that another one has too."""
    blocks = blocks_of(model)
    return bool(_shared(model, blocks, stage_blocks(blocks, num_stages, 0)))


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters by their names in the whole model, of which this may be one stage."""
    names: dict[str, str] = getattr(model, _NAMES, {})
    for name, parameter in model.named_parameters():
        yield names.get(name, name), parameter


def _shared(model: nn.Module, blocks: Sequence[Block], kept: Sequence[Block]) -> dict[str, str]:
    """Parameters of the kept blocks that others have too: name here -> name in the whole model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    ours = tuple(f"{module}." for block in kept for module in block.modules)
    theirs = tuple(f"{module}." for block in blocks if block not in kept for module in block.modules)
    shared = {}
    for each in names.values():
        own = [name for name in each if name.startswith(ours)]
        if own and any(name.startswith(theirs) for name in each):
            shared[own[0]] = each[0]
    return shared


def _take_out(model: nn.Module, name: str) -> None:
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, (nn.ModuleDict, nn.ModuleList)):
        del parent._modules[last]
    else:
        setattr(parent, last, None)


def _sum_over_both(owner: nn.Module, name: str) -> None:
    sum_also_over: Any = getattr(owner, "sum_also_over", None)
    if sum_also_over is not None:  # it keeps its layouts itself
        sum_also_over(TIED)
        return
    parameter = getattr(owner, name)
    layout = layout_of(parameter)
    set_layout(parameter, replace(layout, sum_over=(*layout.sum_over, TIED)))
