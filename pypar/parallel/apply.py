"""Put a model that was written for one device onto a mesh, module by module, in place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from pypar.comm.identical import first_difference
from pypar.layout import local_part
from pypar.mesh import Mesh
from pypar.ops.uncompiled import uncompiled
from pypar.parallel.plan import ParallelPlan
from pypar.parallel.regions import head_counts
from pypar.parallel.roles import ROLES, axes_of
from pypar.parallel.rules import Reading, read_plan
from pypar.parallel.trial.examples import Verify, example_call
from pypar.parallel.trial.numbers import partial_gradients
from pypar.parallel.trial.shapes import check_shapes
from pypar.parallel.trial.together import all_ranks
from pypar.parallel.whole_files import write_whole_files
from pypar.role import Spreading
from pypar.sharded import shard
from pypar.sharded.partial import sum_in_backward
from pypar.tensor_parallel.sharded import ShardedModule


@uncompiled("it changes the model and compares it between ranks")
def parallelize(
    model: nn.Module,
    mesh: Mesh,
    plan: Mapping[str, str] | ParallelPlan | None = None,
    *,
    verify: Verify = None,
) -> nn.Module:
    """Spread a model that was written for one device over the mesh, in place; returns the model.

    Every rank holds the same whole weights before, and keeps its slices after: same losses and gradients as
    before, weights and activations between a column and a row layer 1/tp of the size. On the meta device nothing is
    held, and `materialize` then gives each rank its own part alone. ``plan`` maps patterns of module names (fnmatch;
    the first that fits counts) to roles; a `ParallelPlan` has options beside them:

        "column"          outputs are cut: projections to query, key, value; the first layer of a feed-forward.
                          Also a parameter with a value or row for each head, as attention sinks: it stays
                          whole, and its module's forward sees this rank's part
        "row"             inputs are cut, outputs summed: the projections that follow
        "vocab"           an nn.Embedding, by token id
        "head"            "column" for a head that may be given targets too, as `pypar.models.Head` may: it then gives
                          their loss
        "column_gather"   "column" and then gathered, for a head whose whole logits the model's own loss wants
        "row_split"       "row" for an input that every rank has whole, as after "column_gather"
        "per_head"        a norm whose one weight serves all heads: stays whole, gradients are summed over tp
        "latent_kv"       the first projection to keys and values of multi-head latent attention: stays whole,
                          gradients of its last `qk_rope_head_dim` features are summed over tp
        "norm"            sees this rank's positions under sequence parallelism: gradients are then summed over tp
        "attention"       a module that computes causal attention as `pypar.models.CausalAttention` does: now of this
                          rank's positions to those of all ranks of cp
        "positions"       a module that says which positions a rank has, as `pypar.models.Positions` does
        "whole"           stays as it is

    None takes what the model's class says (``parallel_plan``), as pypar's own models do, or the plan that Hugging Face
    transformers ships with the model, where there is one; experts stay whole then. For other models it takes
    `USUAL_PLAN`, the names of OPT, GPT-NeoX, BART and their like. `plan_of` gives what is taken, for a plan of one's
    own that starts from it. "column" cuts rows in one piece for each rank: right for a projection ordered by heads
    (also a fused one that is ordered by head first, as in GPT-NeoX), wrong for [all queries; all keys; all values] in
    one weight.

    Numbers of heads that an attention module keeps as attributes (num_heads, num_key_value_heads, ...) become
    this rank's. A weight shared between modules stays shared. Column layers beside each other that are given the same
    input (query, key and value; gate and up) share their communication.

    Before anything is changed, the shapes of the cut model are run without data, and ``verify`` says whether its
    numbers are checked: a forward and a backward of a few tokens, in eval mode, by the whole and by the cut model,
    must agree in outputs and in the gradients of all parameters (relative error 1e-3 in fp32, 0.1 in bf16).

        None       where no complete plan was shipped with the model, and its inputs are known (transformers).
                   Where they are not, or memory is short, one warning says that nothing was checked
        True       always; ValueError where that is not possible
        False      never
        a tuple, a mapping, a function of the model
                   always, with model(*verify), model(**verify) or verify(model), which returns a tensor or a
                   structure of tensors

    The check needs memory for the gradients of the whole model. It leaves random generators, buffers, gradients
    and training mode as they were. It also finds the parameters beside cut layers of which each rank gets a part
    of the gradient; these are summed over tp in backward. Of one that is frozen nothing is found out: it is summed
    where the plan says "per_head", and else ValueError says so if it is trained later.

    Parameters that are cut answer for the whole tensor (`pypar.sharded.Sharded`): norms, clipping, optimizers,
    state_dict and the like are those of the whole model, or refused; what reduces or gathers them is called on every
    rank of the axis. The save_pretrained of a transformers model writes whole files and is called on every rank.

    Of the other axes, cp is what the roles "attention" and "positions" are about, and without them it changes nothing
    here, as dp and pp never do: for dp use `GradientBuckets(model.parameters(), mesh.data)`, for pp
    `pypar.blocks.keep_stage` afterwards.

    Raises ValueError, and has then changed nothing: ranks with different weights, a plan that does not fit
    the model, features, vocabulary or heads that do not divide by the tp size, a cut model that does not run or
    computes something else than the whole one.
    """
    plan = ParallelPlan.of(plan)
    spreading = Spreading(model, mesh, plan.sequence_parallel, plan.context)
    reading = read_plan(plan, spreading)
    axis = spreading.over(reading.axes)
    call = example_call(model, verify)
    _check_same_model(model, mesh)
    partial: list[nn.Parameter] = []
    notes = list(reading.notes)
    if axis.size > 1:
        if call is not None:
            check_shapes(model, reading, axis, call)
        partial = partial_gradients(spreading, reading, verify, call, _spread, notes)
    _spread(spreading, reading)
    if axis.size > 1:
        write_whole_files(model, axis, mesh.world)
        for parameter in partial:
            sum_in_backward(parameter, axis)
        for note in notes if mesh.world.rank == 0 else ():
            warnings.warn(note, stacklevel=3)  # past what keeps torch.compile out
    return model


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _check_same_model(model: nn.Module, mesh: Mesh) -> None:
    """ValueError on every rank that the axes reach, where two of them have different models."""
    if _is_meta(model):
        return
    others = [axis for axis in axes_of(mesh) if not set(axis.ranks) <= set(mesh.data.ranks)]
    axes, named = [*others, mesh.data], list(model.named_parameters())
    found = [(axis.name, first_difference(named, axis)) for axis in axes]
    own = [f"on axis {name!r} {what} differs" for name, what in found if what is not None]
    is_same, device = not own, next((x.device for _, x in named), torch.device("cpu"))
    for axis in axes:  # a rank may have the same as all on its own axes
        is_same = all_ranks(is_same, axis, device)
    if not is_same:
        what = own[0] if own else "other ranks differ, and say in what"
        raise ValueError(
            f"parallelize needs the same whole model on every rank, but {what}; build it from one seed "
            "(torch.manual_seed) or load one checkpoint on every rank"
        )


def _spread(spreading: Spreading, reading: Reading) -> None:
    """Put the modules that the roles make, and this rank's numbers of heads, into the model."""
    shared: dict[int, nn.Parameter] = {}
    replacements: dict[int, nn.Module] = {}
    beside: dict[tuple[str, str], list[nn.Module]] = defaultdict(list)
    for match in reading.matches:
        role = ROLES[match.role]
        if spreading.axis(role).size == 1:
            continue
        new = role.replace(match, spreading)
        if new is match.module:
            continue
        if isinstance(new, ShardedModule):
            _give_parts(new, match.module, match.name, shared)
        replacements[id(match.module)] = new.train(match.module.training)
        beside[match.name.rpartition(".")[0], match.role].append(new)
    for parent in list(spreading.model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    for (_, role_name), modules in beside.items():
        join = ROLES[role_name].join
        if join is not None:
            join(modules)
    for region in reading.regions:
        for name, count in head_counts(region.module).items():
            setattr(region.module, name, count // spreading.over(reading.axes).size)


def _give_parts(new: ShardedModule, old: nn.Module, name: str, shared: dict[int, nn.Parameter]) -> None:
    """This rank's parts of a whole module's parameters; those that modules share stay shared."""
    for own, layout in new.layouts().items():
        whole = getattr(old, own)
        if id(whole) not in shared and layout.axes:
            part = local_part(whole.detach(), layout, new.axis)
            shared[id(whole)] = shard(part, layout, new.axis, f"{name}.{own}", whole.requires_grad)
        setattr(new, own, shared.get(id(whole), whole))
    new.set_layouts()
    for own, layout in new.layouts().items():
        if set(new.axis.names) & set(layout.sum_over):  # a bias beside sequence parallelism
            sum_in_backward(getattr(new, own), new.axis)
