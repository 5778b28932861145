"""`shard_context`, which looks at transformers' models before they run: whether what they are given lets them see the
whole sequence."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from pypar.context_parallel.agreement import agree
from pypar.context_parallel.arguments import no_seed
from pypar.context_parallel.intercept import shard_context as intercept
from pypar.context_parallel.intercept.shard_context import ShardContext, active_context
from pypar.hugging_face.joined_positions import joined_positions, scaling_by_length
from pypar.ops.uncompiled import uncompiled

Given = ParamSpec("Given")
_INSTALLED = "pypar_looks_first"
# Attention of transformers that never comes to torch's function. Names of others may be anyone's, who may call it.
_UNSEEN = ("eager", "flash_attention", "flex_attention", "paged|")
_UNLOOKED = "shard_context(..., check_models=False) takes the model as it is"


def _watching(make: Callable[Given, ShardContext]) -> Callable[Given, ShardContext]:
    @functools.wraps(make)
    def shard_context(*args: Given.args, **kwargs: Given.kwargs) -> ShardContext:
        watch_models()
        return make(*args, **kwargs)

    return shard_context


shard_context = _watching(intercept.shard_context)


def watch_models() -> None:
    """transformers' models, where transformers is imported, are looked at before they run in a context.

    A class has no hook that sees keyword arguments before forward, so its call is wrapped, once in a process. Outside
    of a context a model runs as ever.
    """
    model_class = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if model_class is None or hasattr(model_class.__call__, _INSTALLED):
        return
    original = model_class.__call__

    @functools.wraps(original)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = active_context()
        if context is not None and context.check_models and context.axis.size > 1:
            _check(context, model, args, kwargs)
        return original(model, *args, **kwargs)

    setattr(call, _INSTALLED, True)
    model_class.__call__ = call


@uncompiled("a model under shard_context is looked at before it runs; compile without fullgraph=True")
def _check(context: ShardContext, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError, on every rank and before anything is computed: a model that would go by this rank's part alone."""
    signature = inspect.signature(type(model).forward)
    try:
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        return  # forward says what is wrong
    given = {**given, **kwargs}
    offset: int | None = None
    refusal = _of_attention(model, given) or _of_labels(model, given) or _of_mixing(context, model, given)
    if refusal is None and {"position_ids", "input_ids"} & {*signature.parameters, *kwargs}:
        # What is handed on to a model inside is looked at there; a model without one inside would drop it.
        handed_on = "position_ids" in kwargs and len(_models(model)) > 1
        takes = handed_on or "position_ids" in signature.parameters
        position_ids = given.get("position_ids")
        if position_ids is not None and position_ids.is_cuda:
            # The host must wait for the device to read them: once for each kind of call, as the ranks' calls are.
            kind = (type(model), context.whole_length(position_ids.shape[-1]))
            if kind in context.looked_at:
                return
            context.looked_at.add(kind)
        refusal, offset = _of_positions(context, model, position_ids, takes)
    with torch._C.DisableTorchFunction():
        seed = no_seed(next(model.parameters(), torch.empty(0)))
        if refusal is not None:
            agree(context.axis, {"refused": refusal}, seed)
            raise ValueError(refusal)
        # A shift of all positions is the caller's, but it must be one of the whole sequence.
        difference, _ = agree(context.axis, {"position_ids less the positions of the rank": offset}, seed)
    if difference is not None:
        raise ValueError(difference)


def _of_attention(model: Any, given: dict[str, Any]) -> str | None:
    name = type(model).__name__
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    unseen = "/" in implementation or implementation.startswith(_UNSEEN)
    if unseen and _attends_itself(model):
        return (
            f'attn_implementation="{implementation}" of {name} would attend to the keys of this rank alone; load the '
            f'model with "sdpa" or, after pypar.register_with_transformers(), "pypar"; {_UNLOOKED}'
        )
    if given.get("output_attentions"):
        return f"{name} cannot give output_attentions under shard_context; call it without"
    return None


def _attends_itself(model: Any) -> bool:
    """Whether not all attention is that of models inside, which are looked at when they run."""
    inside = [part for part in _models(model) if hasattr(part, "config") and part is not model]
    theirs = {part for other in inside for part in other.modules()}
    return not inside or any(
        "attention" in type(part).__name__.lower() for part in model.modules() if part not in theirs
    )


def _models(model: Any) -> list[Any]:
    """The model and the models of transformers in it."""
    return [part for part in model.modules() if hasattr(type(part).__call__, _INSTALLED)]


def _of_labels(model: Any, given: dict[str, Any]) -> str | None:
    loss = getattr(model, "loss_function", None) if given.get("labels") is not None else None
    if getattr(loss, "__name__", "") != "ForCausalLMLoss" or given.get("shift_labels") is not None:
        return None
    return (
        f"labels of {type(model).__name__} are moved by one position within this rank's part, so that targets at its "
        "ends are lost; compute the loss of the logits and context.shard(targets, 1), or pass these as shift_labels "
        f"with num_items_in_batch; {_UNLOOKED}"
    )


def _of_mixing(context: ShardContext, model: Any, given: dict[str, Any]) -> str | None:
    """Positions that are joined outside of attention, or a loss that is not a sum over positions."""
    known = ("joins no positions", weakref.ref(model))
    joining = None if known in context.looked_at else joined_positions(model)
    if joining is None:
        context.looked_at.add(known)
        held = next((x for x in (given.get("input_ids"), given.get("inputs_embeds")) if x is not None), None)
        if held is not None:
            joining = scaling_by_length(model, context.whole_length(held.shape[1]) - 1)
    if joining is not None:
        return (
            f"{joining} of {type(model).__name__} would take this rank's positions for the whole sequence; "
            f"shard_context needs a model that joins positions by attention alone; {_UNLOOKED}"
        )
    routers = given.get("output_router_logits", getattr(model.config, "output_router_logits", False))
    if routers and given.get("output_router_logits") is not False:
        return (
            f"the auxiliary loss of {type(model).__name__}'s routers is no sum over positions, so that the ranks' "
            f"losses would not add up to it; pass output_router_logits=False; {_UNLOOKED}"
        )
    return None


def _of_positions(
    context: ShardContext, model: Any, position_ids: Tensor | None, takes: bool
) -> tuple[str | None, int | None]:
    """(why the positions are not this rank's or None, what they have been shifted by)."""
    name = type(model).__name__
    if not takes:
        return (
            f"{name} takes no position_ids, so it would count every rank's positions from 0; shard_context needs a "
            f"model that takes them; {_UNLOOKED}",
            None,
        )
    first = max((_first_position(part) for part in model.modules()), default=0)
    remedy = f"position_ids=context.positions(length)[None]{f' + {first}' if first else ''}"
    if position_ids is None:
        return f"{name} without position_ids counts every rank's positions from 0; pass {remedy}", None
    with torch._C.DisableTorchFunction():
        own = context.positions(context.whole_length(position_ids.shape[-1]))
        if own.numel() == 0 == position_ids.shape[-1]:
            return None, first
        shifts = position_ids.detach().cpu().reshape(-1, position_ids.shape[-1])
        shifts = shifts - own if own.numel() == shifts.shape[-1] else torch.arange(2)
        offset = int(shifts.flatten()[0])
        if bool((shifts == offset).all()) and (not first or offset == first):
            return None, offset
        return (
            f"position_ids of {name} are {position_ids.flatten()[:8].tolist()}... but rank {context.axis.rank} of axis "
            f"{context.axis.name!r} holds the positions {own[:8].tolist()}...; pass {remedy}, or pass length to "
            f"shard_context where it does not divide by the ranks; {_UNLOOKED}",
            None,
        )


def _first_position(part: nn.Module) -> int:
    """What a part of a model calls the first position: RoBERTa and its relatives begin after the padding's index."""
    if not hasattr(part, "create_position_ids_from_input_ids"):
        return 0
    return int(getattr(part, "padding_idx", None) or 0) + 1
