"""What gradient buckets can be made of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pypar.comm.identical import first_difference
from pypar.data_parallel.arrivals import Hook
from pypar.mesh import Axis
from pypar.sharded import named_parts, refuse_different_parts


def check_sizes(bucket_bytes: int, first_bucket_bytes: int) -> None:
    if not (bucket_bytes >= 1 and first_bucket_bytes >= 1):  # NaN too
        raise ValueError(
            f"bucket_bytes ({bucket_bytes}) and first_bucket_bytes ({first_bucket_bytes}) must be "
            "positive; 1 << 20 is one MiB"
        )


def trainable(params: Iterable[nn.Parameter], axis: Axis) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require a gradient, each once, with a name; the same on all ranks, or ValueError."""
    named = [(f"parameter {i}", p) for i, p in enumerate(dict.fromkeys(params)) if p.requires_grad]
    if not named:
        raise ValueError(
            "there is no parameter that requires a gradient; pass model.parameters() of a trainable model"
        )
    for name, parameter in named:
        if not parameter.is_leaf:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} was computed from other tensors, and only leaves have gradients; "
                "pass the parameters themselves"
            )
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, Hook) and hook.is_alive for hook in hooks.values()):
            raise ValueError(
                f"{name} {tuple(parameter.shape)} has gradient buckets already, and its gradient would be reduced "
                "twice; use those, or close() them first"
            )
    difference = first_difference(named_parts(named), axis)
    if difference is not None:
        refuse_different_parts("summing gradients", named, axis)
        raise ValueError(
            f"the parameters are not the same on all {axis.size} ranks of axis {axis.name!r}: "
            f"{difference}; start every rank from one seed or one checkpoint"
        )
    return named
