"""What `attn_implementation="pypar"` cannot honour: refused, with its name, as leaving it out would change the result.

transformers hands each attention function all keyword arguments of the model's call. Those that say how attention is
computed, `attention_forward` takes; those below change nothing for it; any other is refused.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

# Names of keyword arguments that leave attention as it is, by the reason.
HARMLESS = {
    "the mask hides it already, so that these are for functions which get no mask": (
        "sliding_window",
        "position_ids",
        "cache_position",
        "token_type_ids",
        "mm_token_type_ids",
        "use_cache",
    ),
    "sizes that go with cu_seq_lens, which is checked": ("max_length_q", "max_length_k", "max_seqlen"),
    "they choose what the model returns, or belong to its loss": (
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "labels",
        "shift_labels",
        "return_loss",
    ),
    "pypar.attention is deterministic unless it is asked not to be": ("deterministic",),
}
_CHOICE = "get_correct_attn_implementation"
_INSTALLED = "pypar_looks_first"
_HARMLESS = frozenset(name for names in HARMLESS.values() for name in names)
# Where documents begin in a packed sequence: right only if the mask says so too.
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def refuse_options(name: str, options: dict[str, Any], mask: Tensor | None) -> None:
    """ValueError for what transformers passes to the attention function `name` and pypar does not know.

    mask: as `attention_forward` gets it, None where it hides nothing but by causality and a window of positions.
    """
    unknown = [
        key
        for key, value in options.items()
        if value is not None and value is not False and key not in _HARMLESS and key not in DOCUMENTS
    ]
    if "output_attentions" in unknown:
        raise ValueError(f'attn_implementation="{name}" computes no attention weights; use "eager" for them')
    if "cache" in unknown:
        raise ValueError(
            f'attn_implementation="{name}" has no paged cache; use "sdpa" for continuous batching'
        )
    if unknown:
        raise ValueError(
            f'attn_implementation="{name}" does not know {_described(unknown[0], options[unknown[0]])}, which the '
            "model or its caller passes to attention; leaving it out could change the result. "
            'Use "eager", or call without it'
        )
    for key in DOCUMENTS:
        if options.get(key) is not None and not _separated(key, options, mask):
            raise ValueError(
                f'{key} says that the sequence is made of documents, but attn_implementation="{name}" takes documents '
                "from position_ids that begin at 0 in each of them, with no attention_mask; pass these too"
            )


def _described(key: str, value: Any) -> str:
    return f"{key} {list(value.shape)}" if isinstance(value, Tensor) else f"{key}={str(value)[:60]}"


def _separated(key: str, options: dict[str, Any], mask: Tensor | None) -> bool:
    """Whether the mask hides the last position before each document from its first. Compiled code looks at no value."""
    if key == "seq_idx":
        index = options[key]
        starts = (index[..., 1:] != index[..., :-1]).reshape(-1, index.shape[-1] - 1).any(0).nonzero()[
            :, 0
        ] + 1
        queries = keys = starts
    else:
        queries, keys = (
            ends[1:-1].long() for ends in (options.get(f"cu_seq_lens_{x}", options[key]) for x in "qk")
        )
    if queries.numel() == 0 or mask is None:
        return queries.numel() == 0
    if torch.compiler.is_compiling():
        return True
    seen = mask[..., queries, keys - 1]
    return not bool((seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min).any())


def watch_implementation(name: str) -> None:
    """transformers' models refuse the attention `name` when they are made if their attention would not come from it.

    Once in a process; transformers asks for no more than that the name is registered. ImportError where transformers is
    too old to say how a model computes its attention.
    """
    from transformers import PreTrainedModel

    if not all(
        hasattr(PreTrainedModel, x)
        for x in ("get_correct_attn_implementation", "_can_set_attn_implementation")
    ):
        raise ImportError("this one does not say how a model computes its attention")
    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, "pypar_looks_first"):
        return

    @functools.wraps(original)
    def checked(model: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
        if requested == name and not _takes_attention(model.__class__):
            raise ValueError(
                f"{type(model).__name__} computes attention itself, so that "
                f'attn_implementation="{name}" would only change its masks; use "eager", or '
                "name the parts that take it, as in "
                f'attn_implementation={{"text_config": "{name}"}}'
            )
        return original(model, requested, *args, **kwargs)

    setattr(checked, _INSTALLED, True)
    setattr(PreTrainedModel, _CHOICE, checked)


@functools.cache
def _takes_attention(model_class: Any) -> bool:
    """Whether a model of transformers leaves all of its attention to the function that is named.

    Two of its own statements must agree: it runs with torch's function or any other (else its masks may be made for its
    own arithmetic), and its file takes the function from the interface and not from a table of its own classes.
    """
    if not (model_class._supports_sdpa or model_class._supports_attention_backend):
        return False
    return model_class._can_set_attn_implementation() and "_ATTENTION_CLASSES[" not in inspect.getsource(
        inspect.getmodule(model_class) or model_class
    )


@torch.compiler.assume_constant_result
def knows_booleans(config_class: Any) -> bool:
    """Whether the model of a configuration runs with torch's function, and so with masks of True and False.

    Others may compute with the numbers of masks, where True and False have no meaning or the opposite one.
    """
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(config_class, ())
    models = found if isinstance(found, tuple) else (found,)
    return bool(models) and all(getattr(model, "_supports_sdpa", False) for model in models)
