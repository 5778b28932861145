"""Put a model that was written for one device onto the tp axis of a mesh, layer by layer, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.mesh import Axis, Mesh
from pypar.ops.uncompiled import uncompiled
from pypar.tensor_parallel.column import ColumnParallelLinear
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.plan import USUAL_PLAN, Match, Region, head_counts, read_plan
from pypar.tensor_parallel.row import RowParallelLinear

__all__ = ["USUAL_PLAN", "parallelize"]


@uncompiled("it changes the model and compares it between ranks")
def parallelize(model: nn.Module, mesh: Mesh, plan: Mapping[str, str] | None = None) -> nn.Module:
    """Swap the model's nn.Linear and nn.Embedding for ones cut over ``mesh.tp``, in place; returns the model.

    Every rank holds the same whole weights before, and keeps its slices after: same losses and gradients as
    before, weights and activations between a column and a row layer 1/tp of the size. ``plan`` maps patterns
    of module names (fnmatch; the first that fits counts) to how each is cut:

        "column"          outputs are cut: projections to query, key, value; the first layer of a feed-forward
        "row"             inputs are cut, outputs summed: the projections that follow
        "vocab"           an nn.Embedding, by token id
        "column_gather"   "column" and then gathered, for a head whose whole logits the model's own loss wants

    None takes `USUAL_PLAN`, the names of Llama, Mistral, Qwen, GPT-NeoX and their like in Hugging Face
    transformers. "column" cuts rows in one piece for each rank: right for a projection ordered by heads (also
    a fused one that is ordered by head first, as in GPT-NeoX), wrong for [all queries; all keys; all values]
    in one weight.

    Numbers of heads that an attention module keeps as attributes (num_heads, num_key_value_heads, ...) become
    this rank's. A weight shared between modules stays shared. Weights of one head's size beside the cut
    layers (a norm of each query) see this rank's heads only: their gradients are summed over tp in backward.

    Axes other than tp change nothing here: for dp use `GradientBuckets(model.parameters(), mesh.data)`.

    Raises ValueError, and has then changed nothing: ranks with different weights, a plan that does not fit
    the model, features, vocabulary or heads that do not divide by the tp size.
    """
    matches, regions = read_plan(model, plan, mesh.tp)
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
    shared: dict[int, nn.Parameter] = {}
    replacements = {id(match.module): _swapped(match, mesh.tp, shared) for match in matches}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    _localise(regions, mesh.tp)
    return model


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
        if match.style == "row":
            new = RowParallelLinear(*sizes, axis, bias=has_bias, **options)
        else:
            gathers = match.style == "column_gather"
            new = ColumnParallelLinear(*sizes, axis, bias=has_bias, gather_output=gathers, **options)
    for name, layout in new.layouts().items():
        whole = getattr(old, name)
        if id(whole) not in shared:
            part = whole.detach()
            for _, dim in layout.shards:
                part = part.chunk(axis.size, dim)[axis.rank].clone()
            is_cut = bool(layout.shards)
            shared[id(whole)] = nn.Parameter(part, requires_grad=whole.requires_grad) if is_cut else whole
        setattr(new, name, shared[id(whole)])
    new.set_layouts()
    return new.train(old.training)


def _localise(regions: Iterable[Region], axis: Axis) -> None:
    """Make the modules between column and row right for this rank's heads: their number, and shared
    weights."""
    hooked: set[int] = set()
    for region in regions:
        for name, count in head_counts(region.module).items():
            setattr(region.module, name, count // axis.size)
        for _, parameter in region.insides:
            if region.is_per_head(parameter) and parameter.requires_grad and id(parameter) not in hooked:
                hooked.add(id(parameter))
                parameter.register_hook(lambda grad: all_reduce_start(grad.clone(), axis).wait())
