"""`recompute`: the blocks of a model keep less than autograd would, and backward computes the rest again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pypar.grid import STAGES
from pypar.mesh import Mesh
from pypar.ops.backend import unknown_name
from pypar.recomputation.config import POLICIES, RecomputeConfig, names_in
from pypar.recomputation.kept import Kept, Part
from pypar.recomputation.offload import MIN_BYTES, Offload
from pypar.recomputation.operators import COSTLY, check_names
from pypar.recomputation.parts import blocks_here, part_of, set_part
from pypar.recomputation.plan.planner import ActivationPlanner
from pypar.recomputation.tiles import tile_positions
from pypar.settings import check_whole_number


def recompute(
    model: nn.Module,
    policy: str = "full",
    *,
    every: int = 1,
    ops: Iterable[str] | None = None,
    blocks: Iterable[str] | None = None,
    checksums: bool = False,
    offload: Offload | None = None,
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
    offload  where what is kept waits for backward: see `pypar.offload_activations`; None: where it is

    Random numbers that a block draws from torch's generators are the same both times; autocast and context managers
    such as `pypar.shard_context` too. A block inside a block that is recomputed adds nothing. With a backward in two
    parts (input gradients, then weights) a block is computed again once. Under torch.compile it is the compiler's own
    checkpoint. ValueError: an unknown policy or operator, ``ops`` without "selective", a model in which no blocks are
    found, a block whose forward was replaced on the object, torch.func's transforms.
    """
    kept = _kept(policy, ops, checksums, saves_all=offload is not None)
    check_whole_number("every", every, 1)
    if offload is not None and not isinstance(offload, Offload):
        raise ValueError(
            f"offload ({offload!r}) must be a pypar.recomputation.offload.Offload or None; "
            "pypar.offload_activations makes one"
        )
    found = blocks_here(model, blocks, is_needed=kept is not None)
    for place, (number, name, module) in enumerate(found):
        if kept is None or number % every:
            set_part(module, None)
        else:
            is_last = place == len(found) - 1
            set_part(module, Part(name, kept, list(module.modules()), offload, place, is_last))
    return model


def offload_activations(
    model: nn.Module,
    policy: str = "none",
    *,
    min_bytes: int | str = MIN_BYTES,
    num_leaving: int = 1,
    host_bytes: int | str | None = None,
    blocks: Iterable[str] | None = None,
) -> nn.Module:
    """Let what a model's blocks keep for backward wait on the host. Returns the model.

        pypar.offload_activations(model)            # all that backward needs, and nothing is computed again
        pypar.offload_activations(model, "full")    # of each block its inputs: what the device keeps is flat over depth
        pypar.recompute(model, "none")              # as it was

    Gradients are the same bits. A block's memory leaves while the next block computes, each piece of it once however
    many tensors lie in it, and comes back while the backward of the block after it computes. Parameters, tensors that
    need no gradient and the last block's stay. On a CPU device and host are two accounts of one memory, so that orders,
    moments and bytes are those of a run on GPUs, where copies have a stream of their own and pinned memory.

    policy       what is kept, as in `pypar.recompute`
    min_bytes    smaller pieces of memory stay on the device; a number, or text such as "2MB", as host_bytes
    num_leaving  blocks whose memory may be on its way to the host at a time
    host_bytes   the most on the host; None: no bound. What goes beyond it is an error
    blocks       as in `pypar.recompute`

    It works with every parallelism, several microbatches in flight and a backward in two parts. Under torch.compile the
    blocks run as they are written. ValueError: as `pypar.recompute`, a negative min_bytes, num_leaving or host_bytes
    below 1.
    """
    offload = Offload(min_bytes=min_bytes, num_leaving=num_leaving, host_bytes=host_bytes)
    return recompute(model, policy, blocks=blocks, offload=offload)


def _kept(policy: str, ops: Iterable[str] | None, checksums: bool, saves_all: bool) -> Kept | None:
    """None: all is, where it is."""
    if policy not in POLICIES:
        raise ValueError(unknown_name("policy", policy, POLICIES, "recompute: "))
    if ops is not None and policy != "selective":
        raise ValueError(
            f'ops names what policy "selective" keeps, and the policy is {policy!r}; leave ops out'
        )
    if policy == "none":
        return Kept(saves_all=True, checks=checksums) if saves_all else None
    if policy == "full":
        return Kept(checks=checksums)
    return Kept.of(check_names(COSTLY if ops is None else ops), checksums)


def recomputed(model: nn.Module) -> Sequence[str]:
    """The names of the modules that backward computes again, or whose saved tensors wait on the host."""
    return [name for name, module in model.named_modules() if part_of(module) is not None]


def recompute_as(
    models: Sequence[nn.Module], config: RecomputeConfig, activation_bytes: str, mesh: Mesh
) -> ActivationPlanner | None:
    """What a run's configuration says of activations, for this rank's stages of a model.

    Returns the planner that meets the budget ``activation_bytes``, None where there is no budget.
    """
    config.check_budget(activation_bytes)
    for model in models:
        if config.tiles > 1:
            tile_positions(model, config.tiles)
    if activation_bytes:
        return _planned(models, config, activation_bytes, mesh)
    offload = Offload(min_bytes=config.offload_min_bytes) if config.offload else None
    for model in models:
        if config.policy != "none" or offload is not None:
            ops = names_in(config.ops) or None
            recompute(
                model, config.policy, every=config.every, ops=ops, checksums=config.checksums, offload=offload
            )
    return None


def _planned(
    models: Sequence[nn.Module], config: RecomputeConfig, activation_bytes: str, mesh: Mesh
) -> ActivationPlanner:
    """A planner of all stages of this rank, which chooses the same on all ranks of its stages."""
    axes = tuple(name for name in mesh.sizes if name != STAGES)
    mesh.declare(axes)
    axis = mesh.axis(*axes)
    planner = ActivationPlanner(
        activation_bytes,
        axis=axis,
        min_bytes=config.offload_min_bytes,
        report=print if axis.rank == 0 else None,
    )
    for model in models:
        planner.add(model)
    return planner
