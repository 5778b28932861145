"""A gradient that arrived, or did not: what is right and what is an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn

from pypar.data_parallel.flat import Bucket, Slot, take_in
from pypar.data_parallel.streams import BucketStreams, NoStreams
from pypar.ops.uncompiled import uncompiled

_ZERO_FIRST = "call buckets.zero() before each step's first backward"


class Hook:
    """Calls owner's `method` with the parameter that backward has reached, and does not keep the owner alive."""

    def __init__(self, method: Callable[[nn.Parameter], None]) -> None:
        self._method = weakref.WeakMethod(method)

    @property
    def is_alive(self) -> bool:
        return self._method() is not None

    @uncompiled("it is communication between ranks")
    def __call__(self, parameter: Tensor) -> None:
        method = self._method()
        if method is not None:
            method(parameter)  # type: ignore[arg-type]


def _refuse_moved(slot: Slot) -> None:
    gradient, flat = slot.gradient, slot.bucket.flat
    in_place = gradient.data_ptr() == flat.data_ptr() + slot.offset * flat.itemsize or not gradient.numel()
    if slot.parameter.dtype != slot.parameter_dtype or not in_place:
        raise RuntimeError(
            f"{slot.name} {tuple(slot.parameter.shape)} was converted or moved (model.to(), half(), double()) after "
            "its gradient buckets were made, and would not be reduced; convert the model first"
        )


def accept(slot: Slot) -> None:
    """Bring a gradient that was added to parameter.grad into the bucket; RuntimeError where that is too late."""
    where = f"{slot.name} {tuple(slot.parameter.shape)}"
    _refuse_moved(slot)
    grad = slot.parameter.grad
    if grad is not None and grad.requires_grad:
        raise RuntimeError(
            f"the gradient of {where} was made with create_graph=True, and what is reduced has no graph; use "
            "torch.autograd.grad(..., create_graph=True) for a gradient's gradient, then backward() without it"
        )
    if slot.is_ready:
        raise RuntimeError(
            f"backward reached {where} again after its gradient was handed to communication; put all but the "
            "step's last backward under `with buckets.accumulate():` and call finish() after the last (reentrant "
            "activation checkpointing also does this: use_reentrant=False does not)"
        )
    if slot.bucket.handle is not None:
        raise RuntimeError(
            f"backward reached {where} after its bucket was handed to communication without it, since it did not "
            "require a gradient; change requires_grad before forward, not between forward and backward"
        )
    if slot.is_stale and (grad is slot.shown or not slot.is_shown):
        raise RuntimeError(
            f"backward added to the sum that finish() left in the gradient of {where}; {_ZERO_FIRST}"
        )
    slot.is_stale = False
    if grad is not slot.shown:
        take_in(slot)


def settle_rest(bucket: Bucket, streams: BucketStreams | NoStreams) -> None:
    """Gradients that were not announced as final: what they hold is what this rank contributes."""
    rest = [slot for slot in bucket.slots if not slot.is_ready]
    if rest:
        with streams.writing(bucket):
            for slot in rest:
                _settle(slot)


def _settle(slot: Slot) -> None:
    _refuse_moved(slot)
    grad = slot.parameter.grad
    if slot.is_stale and (grad is slot.shown or not slot.is_shown):
        raise RuntimeError(
            f"the gradient of {slot.name} {tuple(slot.parameter.shape)} still holds the sum of the last finish(); "
            f"{_ZERO_FIRST}"
        )
    if slot.is_shown and grad is None:
        slot.gradient.zero_()
    if grad is not slot.shown:
        take_in(slot)
