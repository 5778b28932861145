"""`pypar.attention` in Hugging Face transformers' models: `attn_implementation="pypar"`.

transformers asks a mask function, once a forward, for the mask of each kind of layer, and passes it to the attention
function of every such layer. Both are registered together: with the attention alone, transformers would
silently pass no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pypar.context_parallel.intercept.shard_context import ShardContext, active_context
from pypar.hugging_face.attention_options import knows_booleans, refuse_options, watch_implementation
from pypar.ops.attention import Window, attention
from pypar.ops.scaled_dot_product_attention import under_autocast
from pypar.ops.uncompiled import uncompiled

NAME = "pypar"
# On a mask that is nothing but a window of positions; attention then skips what lies outside. An attribute, so that
# whoever cuts or changes the mask gets a plain one, which is always right.
_WINDOW = "pypar_window"


def register_with_transformers() -> None:
    """Makes `attn_implementation="pypar"` known to transformers (`from_pretrained`, `set_attn_implementation`).

    Causal and full attention, sliding windows, softcaps, sinks, grouped heads, dropout, padding, packed sequences and
    key/value caches give what `eager` gives. Refused as a ValueError, with what it is: a model whose attention does not
    come from this interface, when it is made, and an argument of attention that pypar does not know, when it runs.
    ImportError without transformers >= 5.4.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        watch_implementation(NAME)
    except ImportError as error:
        raise ImportError(
            f"transformers >= 5.4 is needed for attn_implementation={NAME!r} ({error}); pip install -U transformers"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, N, T, H], key and value [B, G, S, H]; out [B, T, N, Hv].

    attention_mask: True where a query sees a key, or numbers to add to the scores. s_aux: the sinks.
    """
    refuse_options(NAME, options, None if hasattr(attention_mask, _WINDOW) else attention_mask)
    query, key, value = under_autocast(query, key, value)
    causal, window, bias = False, None, None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif hasattr(attention_mask, _WINDOW):
        window = getattr(attention_mask, _WINDOW)
    else:
        bias = _as_bias(attention_mask[..., : key.shape[2]], query.dtype)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        causal=causal,
        window=window,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        bias=None if bias is None else bias.to(query.dtype),
        dropout_p=dropout if module.training else 0.0,
    )
    return out, None


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a mask hides a key. transformers' masks of numbers hide with the smallest number of their dtype."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def attention_mask(  # noqa: PLR0913 - transformers' signature
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """transformers' mask function: [B, 1, T, S], True where a query sees a key, or "eager"'s numbers to add.

    None for plain causal and full masks, which `attention_forward` makes itself; a mask that is no more than a sliding
    window carries the window.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        sdpa_mask,
    )

    mask_function = mask_function or causal_mask_function
    context = active_context()
    if context is not None and context.axis.size > 1:
        padded = _hides_padding(attention_mask, kv_length, kv_offset)
        mask = _mask_over_ranks(context, mask_function, (q_length, kv_length), padded, options.get("device"))
        return _with_window(mask, batch_size, getattr(mask, _WINDOW))
    # The last query at the last key: what attention takes for granted. A static cache has room behind.
    # Its q_offset may be a tensor.
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    whole = not torch.compiler.is_compiling() and not _hides_padding(attention_mask, kv_length, kv_offset)
    if whole and mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return None
    if whole and aligned and mask_function is causal_mask_function and allow_is_causal_skip:
        return None
    window = _window(mask_function) if whole and aligned else None
    config: Any = options.get("config")
    make: Callable[..., Any] = sdpa_mask if knows_booleans(config.__class__) else eager_mask
    mask = make(
        1 if window else batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        None if window else attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **options,
    )
    if window:
        return _with_window(mask, batch_size, window)
    return mask


def _with_window(mask: Tensor, batch_size: int, window: Window) -> Tensor:
    """The mask for each sequence, as models put masks of their own beside it."""
    mask = mask.expand(batch_size, -1, -1, -1)
    setattr(mask, _WINDOW, window)
    return mask


@uncompiled("the mask says in an attribute what it hides; compile without fullgraph=True")
def _mask_over_ranks(
    context: ShardContext,
    mask_function: Callable,
    lengths: tuple[int, int],
    padded: bool,
    device: torch.device | str | None,
) -> Tensor:
    """Under `pypar.shard_context`: all True, as long as the window that it carries says what it hides."""
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        packed_sequence_mask_function,
        remap_positions_for_packed_sequence,
    )

    length, _ = context.lengths(*lengths)
    parts = _closure(mask_function, and_masks).get("mask_functions", ())
    if len(parts) == 2 and _closure(parts[0], packed_sequence_mask_function):
        # transformers takes positions that jump, as a rank's may, for documents; then it knows the positions.
        remapped = _closure(parts[1], remap_positions_for_packed_sequence)
        shift = remapped["position_ids"] - context.positions(length).to(remapped["position_ids"].device)
        if bool((shift == shift[..., :1]).all()):
            mask_function = remapped["mask_function"]
    window: Window | None = {causal_mask_function: (None, 0), bidirectional_mask_function: (None, None)}.get(
        mask_function
    )
    window = window or _window(mask_function)
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(1, 1, *lengths)
    if window is None or padded:
        what = "padding" if padded else "a mask that is neither causal, full nor a sliding window"
        error = ValueError(
            f"{what} over this rank's {lengths[1]} positions has no meaning under shard_context; pass sequences "
            "without padding, and position_ids of this rank's positions, context.positions(length), without documents"
        )
        context.tell(error, mask)
        raise error
    setattr(mask, _WINDOW, window)
    return mask


def _hides_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> bool:
    if attention_mask is None:
        return False
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    return seen.shape[1] != kv_length or not bool(seen.all())


def _window(mask_function: Callable) -> Window | None:
    """(left, right) of a mask function that is "causal and in a sliding window" as transformers builds it."""
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    parts = _closure(mask_function, and_masks).get("mask_functions", ())
    if len(parts) != 2 or causal_mask_function not in parts:
        return None
    (overlay,) = (part for part in parts if part is not causal_mask_function)
    size = _closure(overlay, sliding_window_overlay).get("sliding_window")
    return (size - 1, 0) if isinstance(size, int) else None


def _closure(function: Callable, maker: Callable) -> dict[str, Any]:
    """What `maker` gave to the function that it made; nothing if another one made it."""
    code = getattr(function, "__code__", None)
    if code is None or code not in maker.__code__.co_consts:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
