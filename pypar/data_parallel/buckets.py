"""Gradients in flat buckets, summed over the data axis while backward still computes the rest.

Backward finishes the last layers' gradients first. As soon as every gradient of a bucket is there its
all-reduce starts, and runs beside the backward of the layers before (Li et al., "PyTorch Distributed", VLDB
2020). Buckets start in one order on all ranks, whatever the order in which gradients become ready: a rank
never waits for a collective that another one starts later.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.data_parallel.flat import Bucket, Slot, fill_buckets, take_in
from pypar.mesh import Axis, as_axis


class GradientBuckets:
    """Sums the gradients of ``params`` over ``axis``, in buckets, while backward runs.

        buckets = GradientBuckets(model.parameters(), mesh.data)
        for batch in batches:
            buckets.zero()
            with buckets.accumulate():
                for microbatch in batch[:-1]:
                    loss(microbatch).backward()     # adds locally, no communication
            loss(batch[-1]).backward()              # buckets are reduced as they fill
            buckets.finish()                        # param.grad is the sum over the ranks, or the mean
            optimizer.step()

    Gradients are views of flat buffers of about ``bucket_bytes`` each, by dtype and device, in reverse order
    of ``params``; the first one is small, so that communication starts early. A gradient that was set to None
    or replaced by the user is copied back. Parameters that took no part in backward count as zero; a
    parameter listed twice counts once.

    ``gradient_dtype`` keeps all gradients in another dtype than the parameters' (fp32 for bf16 parameters):
    they are added up and reduced in it, are read with `gradient(param)`, and param.grad stays None.

    Raises ValueError when ranks hold different parameters, and RuntimeError, always before the step's result
    could be wrong, for backward twice outside of `accumulate()`, backward after `finish()` without `zero()`,
    `finish()` without backward.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        axis: Axis | dist.ProcessGroup,
        *,
        bucket_bytes: int = 25 << 20,
        first_bucket_bytes: int = 1 << 20,
        average: bool = False,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        if bucket_bytes < 1 or first_bucket_bytes < 1:
            raise ValueError(
                f"bucket_bytes ({bucket_bytes}) and first_bucket_bytes ({first_bucket_bytes}) must be "
                "positive; 1 << 20 is one MiB"
            )
        self.axis, self.average = as_axis(axis), average
        named = [(f"parameter {i}", p) for i, p in enumerate(dict.fromkeys(params)) if p.requires_grad]
        if not named:
            raise ValueError(
                "there is no parameter that requires a gradient; pass model.parameters() of a trainable model"
            )
        difference = first_difference(named, self.axis)
        if difference is not None:
            raise ValueError(
                f"the parameters are not the same on all {self.axis.size} ranks of axis {self.axis.name!r}: "
                f"{difference}; start every rank from one seed or one checkpoint"
            )
        self._accumulating = False
        self._num_backward = 0  # gradients that arrived since zero()
        self._next = 0  # the bucket that starts next
        self._buckets = fill_buckets(named, bucket_bytes, first_bucket_bytes, gradient_dtype)
        self._slots = {slot.parameter: slot for bucket in self._buckets for slot in bucket.slots}
        hook = _weak_hook(self)
        for slot in self._slots.values():
            take_in(slot)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for _, p in named]

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's gradient, a view that stays the same tensor; meaningful between `finish()` and
        `zero()`.
        """
        slot = self._slots.get(parameter)
        if slot is None:
            raise ValueError(
                f"a tensor of shape {tuple(parameter.shape)} is not among the parameters that these buckets "
                "were made of; pass it when they are made, with requires_grad=True"
            )
        return slot.gradient

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward in here adds to the gradients and starts no communication: for all but a step's last
        backward.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def finish(self) -> None:
        """Start what is left, wait for all: every gradient is now the sum over the axis (the mean with
        ``average``).
        """
        if not self._num_backward:
            raise RuntimeError(
                "finish() was called, but no backward reached the parameters since the last step; call "
                "loss.backward() first"
            )
        for slot in self._slots.values():
            if not slot.is_ready:
                self._settle(slot)
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            assert bucket.handle is not None
            bucket.handle.wait()
            if self.average and self.axis.size > 1:
                bucket.flat.div_(self.axis.size)
        self._forget_step()
        for slot in self._slots.values():
            slot.is_stale = True

    @torch.no_grad()
    def zero(self) -> None:
        """Set all gradients to zero, in place. To be called before each step's first backward."""
        self._refuse_in_flight("zero()")
        for bucket in self._buckets:
            bucket.flat.zero_()
        for slot in self._slots.values():
            slot.is_stale = False
            slot.parameter.grad = slot.gradient if slot.is_shown else None
        self._forget_step()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all gradients, in place (clipping)."""
        self._refuse_in_flight("scale()")
        for bucket in self._buckets:
            bucket.flat.mul_(factor)

    def close(self) -> None:
        """Take the hooks off the parameters, which may then have other buckets."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A backward has added to parameter.grad."""
        slot = self._slots[parameter]
        if slot.is_ready:
            raise RuntimeError(
                f"backward reached {slot.name} {tuple(parameter.shape)} again after its gradient was handed "
                "to communication; put all but the step's last backward under `with buckets.accumulate():` "
                "and call finish() after the last (reentrant activation checkpointing also does this: "
                "use_reentrant=False does not)"
            )
        if slot.is_stale and (parameter.grad is slot.gradient or not slot.is_shown):
            raise RuntimeError(
                f"backward added to the sum that finish() left in the gradient of {slot.name} "
                f"{tuple(parameter.shape)}; call buckets.zero() before each step's first backward"
            )
        self._num_backward += 1
        slot.is_stale = False
        if parameter.grad is not slot.gradient:
            take_in(slot)
        if self._accumulating:
            return
        slot.is_ready = True
        slot.bucket.num_ready += 1
        while self._next < len(self._buckets) and self._is_full(self._buckets[self._next]):
            self._start_next()

    def _settle(self, slot: Slot) -> None:
        """A gradient that no backward outside of accumulate() has reached: what it holds is what this rank
        contributes.
        """
        if slot.is_stale and (slot.parameter.grad is slot.gradient or not slot.is_shown):
            raise RuntimeError(
                f"the gradient of {slot.name} {tuple(slot.parameter.shape)} still holds the sum of the last "
                "finish(); call buckets.zero() before each step's first backward"
            )
        if slot.is_shown and slot.parameter.grad is not slot.gradient:
            if slot.parameter.grad is None:
                slot.gradient.zero_()
            take_in(slot)

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        bucket.handle = all_reduce_start(bucket.flat, self.axis)
        self._next += 1

    @staticmethod
    def _is_full(bucket: Bucket) -> bool:
        return bucket.num_ready == len(bucket.slots)

    def _forget_step(self) -> None:
        self._num_backward = self._next = 0
        for bucket in self._buckets:
            bucket.num_ready, bucket.handle = 0, None
            for slot in bucket.slots:
                slot.is_ready = False

    def _refuse_in_flight(self, what: str) -> None:
        if self._next:
            raise RuntimeError(f"{what} was called while gradients are being reduced; call finish() first")


def _weak_hook(buckets: GradientBuckets) -> Callable[[Tensor], None]:
    """A hook that does not keep the buckets alive: they go when their user drops them."""
    reference = weakref.ref(buckets)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._arrived(parameter)  # type: ignore[arg-type]

    return hook
