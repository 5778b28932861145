"""Gradients in flat buckets, summed over the data axis while backward still computes the rest.

Backward finishes the last layers' gradients first. As soon as every gradient of a bucket is there its reduction starts,
and runs beside the backward of the layers before (Li et al., "PyTorch Distributed", VLDB 2020). Buckets start in one
order on all ranks, whatever the order in which gradients become ready: a rank never waits for a collective that another
one starts later.

What is plugged in, by the interfaces of reduction.py: a reduction reduces a bucket (`reduction.reduce_start(bucket,
axis)`, whose `wait()` leaves the result in `bucket.flat`); streams are told `wrote(bucket)` for every gradient that
arrived, `before_communication(bucket)` before reduce_start and `after(bucket)` after wait(). An axis of one rank has
neither.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pypar.data_parallel.arguments import check_sizes, trainable
from pypar.data_parallel.arrivals import Hook, accept, settle_rest
from pypar.data_parallel.flat import Bucket, Slot, fill_buckets, make_slots, shard_of, take_in
from pypar.data_parallel.power_sgd import PowerSGD
from pypar.data_parallel.ready_order import agree_on_order
from pypar.data_parallel.reduction import explained, make_reduction
from pypar.data_parallel.streams import streams_for
from pypar.mesh import Axis, as_axis
from pypar.ops.uncompiled import uncompiled_class

Shard = tuple[Tensor, list[tuple[nn.Parameter, slice, slice]]]


@uncompiled_class("it is communication between ranks")
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

    Gradients lie in flat buffers of about ``bucket_bytes`` each, by dtype and device; the first one is small, so
    that communication starts early. Their order is at first the reverse of ``params``; with ``rebuild`` the
    first `finish()` fills them anew, everywhere in the order in which the first rank's gradients became ready. A
    gradient that was set to None or replaced by the user is copied back. Parameters that took no part in
    backward, frozen ones too, count as zero; a parameter listed twice counts once.

    average         the mean instead of the sum
    gradient_dtype  keeps all gradients in another dtype than the parameters' (fp32 for bf16 parameters): they are
                    added up in it, are read with `gradient(param)`, and param.grad stays None
    comm_dtype      what travels is rounded to it (torch.bfloat16); costs a buffer of that dtype
    reduce_scatter  each rank gets the sum of its own part of each bucket, see `shards()`; the rest of the gradients is
                    undefined after `finish()`. Buckets are not rebuilt: an optimizer's state belongs to shards
    power_sgd_rank  compresses matrices to this rank (arXiv 1905.13727); 0: exact

    On the backend "pypar" the result is the same bits for any bucket size and any order of arrival, and equal to an
    all_reduce of each gradient. Raises ValueError when ranks hold different parameters, and RuntimeError, always before
    the step's result could be wrong, for backward twice outside of `accumulate()`, backward after `finish()` without
    `zero()`, `finish()` without backward.
    """

    def __init__(  # noqa: PLR0913 - one argument an option
        self,
        params: Iterable[nn.Parameter],
        axis: Axis | dist.ProcessGroup,
        *,
        bucket_bytes: int = 25 << 20,
        first_bucket_bytes: int = 1 << 20,
        average: bool = False,
        gradient_dtype: torch.dtype | None = None,
        comm_dtype: torch.dtype | None = None,
        reduce_scatter: bool = False,
        power_sgd_rank: int = 0,
        rebuild: bool = True,
    ) -> None:
        check_sizes(bucket_bytes, first_bucket_bytes)
        self.axis, self.average, self.reduce_scatter = as_axis(axis), average, reduce_scatter
        self._reduction = make_reduction(average, comm_dtype, reduce_scatter, power_sgd_rank)
        self.power_sgd = self._reduction if isinstance(self._reduction, PowerSGD) else None
        named = trainable(params, self.axis)
        self._accumulating = False
        self._on_reduction: weakref.WeakMethod[Callable[[], None]] | None = None
        self._num_backward = 0  # gradients that arrived since zero()
        self._num_steps = 0
        self._next = 0  # the bucket that starts next
        self._sizes = bucket_bytes, first_bucket_bytes, self.axis, comm_dtype
        self._slots = {slot.parameter: slot for slot in make_slots(named, gradient_dtype)}
        self._ready: list[Slot] = []  # in the order in which they became final
        self._is_rebuilt = not rebuild or reduce_scatter or self.axis.size == 1
        self._buckets: list[Bucket] = []
        self._streams = streams_for(self._buckets)
        self._fill(list(reversed(self._slots.values())))
        for slot in self._slots.values():
            take_in(slot)
        self._mark(is_stale=False)
        hook = Hook(self._reached)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._slots]

    def _fill(self, slots: list[Slot]) -> None:
        old, self._buckets = self._buckets, fill_buckets(slots, *self._sizes)
        for bucket in old:
            self._streams.before_release(bucket)
        self._streams = streams_for(self._buckets)

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    @property
    def is_accumulating(self) -> bool:
        return self._accumulating

    @property
    def padding_bytes(self) -> int:
        """The padding of all buckets: every rank's part of a bucket is as many whole cache lines."""
        return sum(bucket.padding_bytes for bucket in self._buckets)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's gradient, a tensor that stays the same one; meaningful between `finish()` and `zero()`."""
        if self.reduce_scatter:
            raise ValueError(
                "with reduce_scatter=True no rank has a whole gradient after finish(); read this rank's parts "
                "with shards(), or make the buckets with reduce_scatter=False"
            )
        return self._slot(parameter).shown

    def shards(self) -> list[Shard]:
        """What this rank answers for after a reduce-scatter: for each bucket (flat part, pieces).

        Pieces are (parameter, slice of its flat elements, slice of the flat part). The parts of all ranks together
        hold every element once, and padding that is zero. They stay where they are.
        """
        if not self.reduce_scatter:
            raise ValueError(
                "shards() is for buckets made with reduce_scatter=True; here every rank has all, see gradient(param)"
            )
        return [shard_of(bucket, self.axis.rank, self.axis.size) for bucket in self._buckets]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward in here adds to the gradients, without communication: for all but a step's last backward."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def arrived(self, *parameters: nn.Parameter) -> None:
        """Say that gradients were added to param.grad without a backward that reached the parameters.

        A backward in two parts (torch.autograd.grad for inputs first, weights later) runs no hooks. Under
        `accumulate()` more is to come; outside it the gradients are final and may be sent. `finish()` sends the others.
        """
        for parameter in parameters:
            slot = self._slot(parameter)
            if parameter.grad is None and slot.is_shown:
                slot.gradient.zero_()
            self._arrive(slot)

    @torch.no_grad()
    def start_rest(self) -> None:
        """Start what backward left, without waiting: for several buckets, of which all start before one finishes."""
        for bucket in self._buckets[self._next :]:
            settle_rest(bucket, self._streams)
        while self._next < len(self._buckets):
            self._start_next(settled=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Start what is left, wait for all: every gradient is now the sum over the axis (with ``average`` the mean)."""
        if not self._num_backward and not any(slot.is_written for slot in self._slots.values()):
            raise RuntimeError(
                "finish() was called, but no backward reached the parameters since the last step; call "
                "loss.backward() first"
            )
        self.start_rest()
        for bucket in self._buckets:
            if bucket.handle is not None:
                with explained(f"the reduction of gradients in step {self._num_steps + 1}", self.axis):
                    bucket.handle.wait()
                self._streams.after(bucket)
        self._num_steps += 1
        seen = self._ready
        self._forget_step()
        if not self._is_rebuilt:
            self._is_rebuilt = True
            self._fill(agree_on_order([s for b in self._buckets for s in b.slots], seen, self.axis))
        self._mark(is_stale=True)

    @torch.no_grad()
    def zero(self) -> None:
        """Set all gradients to zero, in place. To be called before each step's first backward."""
        self._refuse_in_flight("zero()")
        for bucket in self._buckets:
            with self._streams.writing(bucket):
                bucket.flat.zero_()
        for slot in self._slots.values():
            slot.parameter.grad = slot.shown if slot.is_shown else None
        self._forget_step()
        self._mark(is_stale=False)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all gradients, in place (clipping)."""
        self._refuse_in_flight("scale()")
        for bucket in self._buckets:
            with self._streams.writing(bucket):
                bucket.gradients.mul_(factor)

    def carry_over(self) -> None:
        """After `finish()`: let the next backward add to the means that it left, in place of `zero()`.

        The mean over ranks of what is the same on all of them is that itself. A sum would be summed again.
        """
        if not self.average:
            raise ValueError("carry_over() needs average=True: a sum would be summed again; call zero()")
        self._refuse_in_flight("carry_over()")
        self._mark(is_stale=False)

    def on_reduction(self, call: Callable[[], None]) -> None:
        """From now on call this method, inside backward, when a step's first gradient is final."""
        self._on_reduction = weakref.WeakMethod(call)

    def close(self) -> None:
        """Take the hooks off the parameters, which may then have other buckets."""
        for hook in self._hooks:
            hook.remove()

    def _slot(self, parameter: nn.Parameter) -> Slot:
        slot = self._slots.get(parameter)
        if slot is None:
            raise ValueError(
                f"a tensor of shape {tuple(parameter.shape)} is not among the parameters that these buckets "
                "were made of; pass it when they are made, with requires_grad=True"
            )
        return slot

    @torch.no_grad()
    def _reached(self, parameter: nn.Parameter) -> None:
        """The hook: a backward has added to parameter.grad."""
        self._arrive(self._slots[parameter])

    def _arrive(self, slot: Slot) -> None:
        accept(slot)
        self._num_backward += 1
        self._streams.wrote(slot.bucket)
        if self._accumulating:
            return
        if not self._ready:
            self._begin_reduction()
        self._ready.append(slot)
        slot.is_ready = True
        slot.bucket.num_ready += 1
        slot.bucket.num_frozen -= slot.is_frozen
        while self._next < len(self._buckets) and self._buckets[self._next].is_full:
            self._start_next()

    def _begin_reduction(self) -> None:
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.is_frozen = not slot.parameter.requires_grad
            bucket.num_frozen = sum(slot.is_frozen for slot in bucket.slots)
        call = self._on_reduction() if self._on_reduction is not None else None
        if call is not None:
            call()

    def _start_next(self, settled: bool = False) -> None:
        bucket = self._buckets[self._next]
        if not settled:
            settle_rest(bucket, self._streams)  # frozen ones: not once it is under way
        if self.axis.size > 1:
            self._streams.before_communication(bucket)
            bucket.handle = self._reduction.reduce_start(bucket, self.axis)
        self._next += 1

    def _forget_step(self) -> None:
        self._num_backward = self._next = 0
        self._ready = []
        for bucket in self._buckets:
            bucket.num_ready, bucket.handle = 0, None
            for slot in bucket.slots:
                slot.is_ready = False

    def _mark(self, *, is_stale: bool) -> None:
        for slot in self._slots.values():
            slot.is_stale, slot.version = is_stale, slot.shown._version

    def _refuse_in_flight(self, what: str) -> None:
        if self._next:
            raise RuntimeError(f"{what} was called while gradients are being reduced; call finish() first")
