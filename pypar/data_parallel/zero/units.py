"""Which parameters are gathered, reduced and freed together: those of a block, and the root's, which are all others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pypar.blocks import Block, found_blocks, is_here


def blocks_for(model: nn.Module, blocks: Sequence[Block | str] | None) -> list[Block]:
    """The blocks whose parameters come and go.

    blocks  `Block`s or names of modules; None: what the model's function blocks() says, else the members of its
            outermost ModuleLists of two or more modules of one class

    ValueError for modules that the model lacks or that lie in one another.
    """
    if blocks is None:
        found = found_blocks(model)
    else:
        found = [Block(each, (each,)) if isinstance(each, str) else each for each in blocks]
        _check(model, found)
    here = [Block(block.name, tuple(m for m in block.modules if is_here(model, m))) for block in found]
    return [block for block in here if block.modules]


def _check(model: nn.Module, blocks: Sequence[Block]) -> None:
    names = dict(model.named_modules(remove_duplicate=False))
    seen: list[str] = []
    for block in blocks:
        for module in block.modules:
            if module not in names or not module:
                raise ValueError(
                    f"block {block.name!r} names the module {module!r}, which this {type(model).__name__} does not "
                    "have; give names of model.named_modules()"
                )
            for other in seen:
                if f"{module}.".startswith(f"{other}.") or f"{other}.".startswith(f"{module}."):
                    raise ValueError(
                        f"the modules {other!r} and {module!r} lie in one another, and blocks are apart; name one of "
                        "them"
                    )
            seen.append(module)


def split_by_block(
    model: nn.Module, blocks: Sequence[Block]
) -> tuple[dict[Block, list[nn.Parameter]], list[nn.Parameter], set[Block]]:
    """(parameters of each block alone, those of the root, blocks that use some of the root's)."""
    homes: dict[nn.Parameter, set[Block | None]] = {}
    hooked = {id(model.get_submodule(name)): block for block in blocks for name in block.modules}

    def visit(module: nn.Module, home: Block | None) -> None:
        home = hooked.get(id(module), home)
        for parameter in module._parameters.values():
            if parameter is not None:
                homes.setdefault(parameter, set()).add(home)
        for child in module.children():
            visit(child, home)

    visit(model, None)
    own: dict[Block, list[nn.Parameter]] = {block: [] for block in blocks}
    root: list[nn.Parameter] = []
    sharing: set[Block] = set()
    for parameter, where in homes.items():
        home, *others = where
        if home is None or others:
            root.append(parameter)
            sharing |= {block for block in where if block is not None}
        else:
            own[home].append(parameter)
    return own, root, sharing
