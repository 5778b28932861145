"""Put a model that was written for one device onto the tp axis of a mesh, layer by layer, in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.layout import local_part
from pypar.mesh import Axis, Mesh
from pypar.ops.uncompiled import uncompiled
from pypar.sharded import shard
from pypar.tensor_parallel.column import ColumnParallelLinear
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.heads import give_heads
from pypar.tensor_parallel.latent import LatentKeyValueLinear, num_shared_features
from pypar.tensor_parallel.plan import USUAL_PLAN, Reading, plan_of, read_plan
from pypar.tensor_parallel.regions import Match, head_counts
from pypar.tensor_parallel.row import RowParallelLinear
from pypar.tensor_parallel.trial.examples import Verify, example_call
from pypar.tensor_parallel.trial.numbers import partial_gradients
from pypar.tensor_parallel.trial.shapes import check_shapes
from pypar.tensor_parallel.whole_files import write_whole_files

__all__ = ["USUAL_PLAN", "parallelize", "plan_of"]


@uncompiled("it changes the model and compares it between ranks")
def parallelize(
    model: nn.Module, mesh: Mesh, plan: Mapping[str, str] | None = None, *, verify: Verify = None
) -> nn.Module:
    """Swap the model's nn.Linear and nn.Embedding for ones cut over ``mesh.tp``, in place; returns the model.

    Every rank holds the same whole weights before, and keeps its slices after: same losses and gradients as
    before, weights and activations between a column and a row layer 1/tp of the size. ``plan`` maps patterns
    of module names (fnmatch; the first that fits counts) to how each is cut:

        "column"          outputs are cut: projections to query, key, value; the first layer of a feed-forward.
                          Also a parameter with a value or row for each head, as attention sinks: it stays
                          whole, and its module's forward sees this rank's part
        "row"             inputs are cut, outputs summed: the projections that follow
        "vocab"           an nn.Embedding, by token id
        "column_gather"   "column" and then gathered, for a head whose whole logits the model's own loss wants
        "row_split"       "row" for an input that every rank has whole, as after "column_gather"
        "per_head"        a norm whose one weight serves all heads: stays whole, gradients are summed over tp
        "latent_kv"       the first projection to keys and values of multi-head latent attention: stays whole,
                          gradients of its last `qk_rope_head_dim` features are summed over tp
        "whole"           stays as it is

    None takes the plan that Hugging Face transformers ships with the model, where there is one; experts stay
    whole then. For other models it takes `USUAL_PLAN`, the names of OPT, GPT-NeoX, BART and their like. `plan_of`
    gives either, for a plan of one's own that starts from it. "column" cuts rows in one piece for each rank:
    right for a projection ordered by heads (also a fused one that is ordered by head first, as in GPT-NeoX),
    wrong for [all queries; all keys; all values] in one weight.

    Numbers of heads that an attention module keeps as attributes (num_heads, num_key_value_heads, ...) become
    this rank's. A weight shared between modules stays shared.

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
    of the gradient; these are summed over tp in backward.

    Parameters that are cut answer for the whole tensor (`pypar.sharded.Sharded`): norms, clipping, optimizers,
    state_dict and the like are those of the whole model, or refused; what reduces or gathers them is called on every
    rank of the axis. The save_pretrained of a transformers model writes whole files and is called on every rank.

    Axes other than tp change nothing here: for dp use `GradientBuckets(model.parameters(), mesh.data)`.

    Raises ValueError, and has then changed nothing: ranks with different weights, a plan that does not fit
    the model, features, vocabulary or heads that do not divide by the tp size, a cut model that does not run or
    computes something else than the whole one.
    """
    reading = read_plan(model, plan, mesh.tp)
    call = example_call(model, verify)
    for axis in (mesh.tp, mesh.data):
        difference = first_difference(list(model.named_parameters()), axis)
        if difference is not None:
            raise ValueError(
                f"parallelize needs the same whole model on every rank, but on axis {axis.name!r} "
                f"{difference} differs; build it from one seed (torch.manual_seed) or load one checkpoint on "
                "every rank"
            )
    if mesh.tp.size == 1:
        return model
    if call is not None:
        check_shapes(model, reading, mesh.tp, call)
    notes = list(reading.notes)
    partial = partial_gradients(model, reading, mesh, verify, call, _cut, notes)
    _cut(model, reading, mesh.tp)
    write_whole_files(model, mesh)
    for parameter in partial:
        parameter.register_hook(lambda grad: all_reduce_start(grad.clone(), mesh.tp).wait())
    for note in notes if mesh.world.rank == 0 else ():
        warnings.warn(note, stacklevel=3)  # past what keeps torch.compile out
    return model


def _cut(model: nn.Module, reading: Reading, axis: Axis) -> None:
    """Put the cut layers and parameters and this rank's numbers of heads into the model."""
    shared: dict[int, nn.Parameter] = {}
    replacements: dict[int, nn.Module] = {}
    for match in reading.matches:
        if match.parameter is not None and match.style == "column":
            give_heads(match.module, match.parameter, axis)
        elif match.style == "latent_kv":
            assert isinstance(match.module, nn.Linear)
            num_shared = num_shared_features(model, match.name)
            replacements[id(match.module)] = LatentKeyValueLinear(match.module, num_shared, axis)
        elif match.style != "per_head":
            replacements[id(match.module)] = _swapped(match, axis, shared)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    for region in reading.regions:
        for name, count in head_counts(region.module).items():
            setattr(region.module, name, count // axis.size)


def _swapped(match: Match, axis: Axis, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The module's replacement, made on the meta device, so that no value is drawn; then it gets the
    slices."""
    old = match.module
    options: dict[str, Any] = {"dtype": old.weight.dtype, "device": "meta"}
    new: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding
    if isinstance(old, nn.Embedding):
        new = VocabParallelEmbedding(
            old.num_embeddings, old.embedding_dim, axis, padding_idx=old.padding_idx, **options
        )
    else:
        assert isinstance(old, nn.Linear)
        sizes, has_bias = (old.in_features, old.out_features), old.bias is not None
        if match.style in ("row", "row_split"):
            splits = match.style == "row_split"
            new = RowParallelLinear(*sizes, axis, bias=has_bias, split_input=splits, **options)
        else:
            gathers = match.style == "column_gather"
            new = ColumnParallelLinear(*sizes, axis, bias=has_bias, gather_output=gathers, **options)
    for name, layout in new.layouts().items():
        whole = getattr(old, name)
        if id(whole) not in shared:
            label = f"{match.name}.{name}"
            part = local_part(whole.detach(), layout, axis)
            made = shard(part, layout, axis, label, whole.requires_grad) if layout.axes else whole
            shared[id(whole)] = made
        setattr(new, name, shared[id(whole)])
    new.set_layouts()
    return new.train(old.training)
