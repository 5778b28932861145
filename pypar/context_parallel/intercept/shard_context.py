"""Models that know nothing of context parallelism: under `shard_context` their attention runs over a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from pypar.context_parallel import layouts
from pypar.context_parallel.agreement import agree
from pypar.context_parallel.arguments import no_seed
from pypar.context_parallel.attention import ring_attention
from pypar.context_parallel.intercept.multi_head import multi_head
from pypar.context_parallel.intercept.other_attention import (
    is_flex_attention,
    refuse,
    refuse_flex_attention,
    refused_functions,
)
from pypar.context_parallel.layouts import num_positions, segments_of
from pypar.context_parallel.methods.registry import method_named
from pypar.mesh import Axis, as_axis
from pypar.ops.attention import Window, attention
from pypar.ops.scaled_dot_product_attention import as_torch, scaled_dot_product_attention
from pypar.ops.uncompiled import uncompiled

_TOLD = "pypar_told"  # on an error that all ranks know of


def shard_context(
    group: Axis | dist.ProcessGroup,
    *,
    method: str = "ring",
    layout: str = "zigzag",
    length: int | None = None,
    length_k: int | None = None,
    method_options: Mapping[str, Any] | None = None,
    check_models: bool = True,
) -> ShardContext:
    """Under `with shard_context(group) as context:` attention of unmodified code runs over the ranks of the group.

    What runs over the group: calls of `pypar.attention`, `pypar.scaled_dot_product_attention`, torch's
    F.scaled_dot_product_attention and nn.MultiheadAttention, and so models of torch and of transformers
    (attn_implementation "sdpa", or "pypar" after `pypar.register_with_transformers()`). All else acts on this
    rank's positions as it is: give the model its part of the tokens and of the targets (`context.shard(x, dim)`)
    and their positions (`context.positions(length)`, for transformers as position_ids). Losses and gradients of
    weights are then this rank's share: their sum over the group is the whole.

    Args:
        method, layout, method_options: as in `ring_attention`.
        length: of the whole sequence, where it does not divide by the number of ranks.
        length_k: of the whole sequence of keys, where they are another one (cross attention); sharded alike.
        check_models: False takes transformers' models as they are.

    Masks and biases have this rank's rows and the keys of the whole sequence in their order; causal is in positions
    of the whole. Refused as a ValueError, as its meaning is not clear: masks over this rank's keys, cu_seqlens,
    caches of keys, padding. Attention that would see this rank's keys only is refused where it passes through torch:
    flex_attention (compiled by itself: torch's error, which has the sentence), torch.nn.attention.varlen,
    FlashAttention's functions since 2.7.1, xformers', torch's own kernels.

    A model of transformers, if that was imported before shard_context was called, is looked at before it runs (on
    GPUs once for each length): it needs position_ids (this rank's positions, shifted by no more than one number for
    all) that a forward in it names, "sdpa" or "pypar" as attention, no labels that it would shift itself, and no part
    that joins positions outside of attention (`transformers_mixing` lists what is known to).

    Not seen, and so over this rank's positions only: attention written out as matrix products (outside
    transformers), FlashAttention before 2.7.1, in version 4 and with its cache of keys, models of torch.jit, calls of a
    model's forward by name, and outside of transformers all that mixes positions without attention (convolutions, state
    spaces).

    torch.compile breaks its graph at each attention, so fullgraph=True is refused; in a compiled function `with ... as`
    gives None, as for every mode of torch: name the context before. Activation checkpoints run forward again in
    backward, so call loss.backward() inside too.
    """
    method_named(method)
    segments_of(0, 0, 1, layout)
    return ShardContext(
        as_axis(group), method, layout, length, length_k, dict(method_options or {}), check_models
    )


class ShardContext(TorchFunctionMode):
    """What `shard_context` returns; one may be entered many times."""

    def __init__(
        self,
        axis: Axis,
        method: str,
        layout: str,
        length: int | None,
        length_k: int | None,
        method_options: dict[str, Any],
        check_models: bool,
    ) -> None:
        super().__init__()
        self.check_models = check_models
        self.looked_at: set[tuple[object, ...]] = set()
        self.axis, self.method, self.layout = axis, method, layout
        self.length, self.length_k, self.method_options = length, length_k, method_options
        self._replaced: dict[Any, Callable[..., Any]] = {
            attention: self._attention,
            scaled_dot_product_attention: self._torch_attention,
            F.scaled_dot_product_attention: self._torch_attention,
            F.multi_head_attention_forward: functools.partial(multi_head, self._torch_attention),
        }
        sdpa = torch.ops.aten.scaled_dot_product_attention  # what torch.export leaves
        self._replaced |= dict.fromkeys((sdpa, sdpa.default), self._torch_attention)
        for function, name in refused_functions().items():
            self._replaced[function] = functools.partial(refuse, name)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.backward:
            with self:  # torch takes the mode away, but activation checkpoints run forward in it
                return _backward(*args, **(kwargs or {}))
        if is_flex_attention(func):
            refuse_flex_attention()
        replacement = self._replaced.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return self._run(replacement, args, kwargs or {})

    @uncompiled("attention under shard_context is communication; compile without fullgraph=True")
    def _run(self, replacement: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a replacement, which calls attention itself. An error of this rank alone is told to the others."""
        with torch._C.DisableTorchFunction():
            try:
                return replacement(*args, **kwargs)
            except ValueError as error:
                if not hasattr(error, _TOLD):
                    self.tell(error, next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
                raise

    def tell(self, error: ValueError, x: Tensor) -> None:
        """Before this rank raises: the others' next attention raises too. x: a tensor on the device of the group."""
        if self.axis.size > 1:
            agree(self.axis, {"refused": str(error)}, no_seed(x))

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """`context_parallel.shard` with this group and layout."""
        return layouts.shard(x, dim, self.axis, self.layout)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """`context_parallel.unshard` with this group, layout and length."""
        return layouts.unshard(x, dim, self.axis, self.layout, self.length)

    def positions(self, length: int) -> Tensor:
        """Which positions of a sequence of `length` this rank holds: int64 [T], on CPU."""
        return layouts.positions(length, self.axis, self.layout)

    def lengths(self, held_q: int, held_k: int) -> tuple[int, int]:
        """Positions in the whole of queries and keys of which this rank holds so many. ValueError: a cache."""
        if held_q == held_k:
            whole = self.whole_length(held_q)
            return whole, whole
        if self.length_k is None or held_k != self._share(self.length_k):
            raise ValueError(
                f"{held_q} queries and {held_k} keys on rank {self.axis.rank} are not parts of one sequence. Under "
                "shard_context a cache of keys cannot be used; for cross attention over sharded keys pass their whole "
                "length as length_k"
            )
        return self.whole_length(held_q), self.length_k

    def _share(self, length: int) -> int:
        return num_positions(segments_of(length, self.axis.rank, self.axis.size, self.layout))

    def whole_length(self, held: int) -> int:
        """Positions in the whole of a sequence of which this rank holds so many."""
        length = self.length
        return held * self.axis.size if length is None or self._share(length) != held else length

    def _attention(  # noqa: PLR0913 - the op's signature
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window: Window | None = None,
        bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        deterministic: bool = True,
        **options: Any,
    ) -> Any:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens of this rank's sequences have no meaning under shard_context; call pypar.ring_attention "
                "with the cu_seqlens of the whole"
            )
        length_q, length_k = self.lengths(q.shape[1], k.shape[1])
        if length_q != length_k and (causal or window is not None):
            raise ValueError(
                f"causal or a window over {length_q} queries and {length_k} keys is not clear under shard_context; "
                "call pypar.ring_attention"
            )
        if bias is not None and bias.dim() > 0 and bias.shape[-1] not in (1, length_k):
            raise ValueError(_mask_refusal("bias", bias, length_k))
        options |= {
            "causal": causal,
            "window": window,
            "bias": bias,
            "length_q": length_q,
            "length_k": length_k,
        }
        options |= {"method": self.method, "layout": self.layout, "method_options": self.method_options}
        try:
            return ring_attention(q, k, v, self.axis, **options)
        except ValueError as error:
            setattr(error, _TOLD, True)
            raise

    def _torch_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        length_q, length_k = self.lengths(query.shape[-2], key.shape[-2])
        if is_causal and length_q != length_k:
            raise ValueError(
                f"is_causal over {length_q} queries and {length_k} keys is not clear under shard_context; call "
                "pypar.ring_attention"
            )
        if attn_mask is not None and attn_mask.dim() > 0 and attn_mask.shape[-1] not in (1, length_k):
            raise ValueError(_mask_refusal("attn_mask", attn_mask, length_k))
        options |= {"dropout_p": dropout_p, "scale": scale}
        operands = (query, key, value)
        return as_torch(self._attention, operands, attn_mask, is_causal, enable_gqa, options, length_k)


def active_context() -> ShardContext | None:
    """The innermost `shard_context` that this thread is in."""
    found = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, ShardContext)]
    return found[-1] if found else None


def _backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Tensor.backward that leaves the mode on: since torch 2.7 by naming the loss as an edge of the graph."""
    edge = loss if torch.__version__ < "2.7" else torch.autograd.graph.get_gradient_edge(loss)
    gradient = torch.ones_like(loss) if gradient is None and loss.numel() == 1 else gradient
    torch.autograd.backward(edge, gradient, retain_graph, create_graph, inputs=inputs)  # type: ignore[arg-type]


def _mask_refusal(name: str, mask: Tensor, length_k: int) -> str:
    return (
        f"{name} {tuple(mask.shape)} has columns for {mask.shape[-1]} keys; under shard_context it must have this "
        f"rank's rows and a column for each of the whole sequence's {length_k} keys, in order; where it is no more "
        "than causal or full, pass is_causal and no mask (transformers: attention_mask of ones)"
    )
