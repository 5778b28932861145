"""How a bucket's gradients are summed over an axis: whole or scattered, in what dtype they travel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import Handle, all_reduce_start, reduce_scatter_start
from pypar.comm.cpu_group import CpuProcessGroup
from pypar.data_parallel.flat import Bucket, Started
from pypar.data_parallel.power_sgd import PowerSGD
from pypar.mesh import Axis
from pypar.ops.bucket import bucket as scale_and_cast

_TRAVELS = (torch.float32, torch.bfloat16, torch.float16)


class Reduction(Protocol):
    """What reduces a bucket. One object serves all buckets of a `GradientBuckets`.

    Buckets are started in one order on all ranks, and waited for in that order; between them other buckets of
    the same step are started. Buckets are made anew once, after the first step: what must outlive a step is
    kept by parameter (`slot.parameter`), not by bucket.
    """

    def reduce_start(self, bucket: Bucket, axis: Axis) -> Started:
        """Start the communication of `bucket.flat` (gradients of `bucket.slots`, one after the other, each at its
        `offset`; zeros behind `num_elements`). `wait()` of what is returned leaves the sum, or the mean, there.

        The axis has at least two ranks. Runs inside backward, on the thread of the engine, without gradients.
        """


class FlatReduction:
    """All-reduce, or reduce-scatter, of the flat buffer.

    With comm_dtype the gradients are scaled and rounded to it in the one pass that writes what travels, and
    widened in the one that reads it; the backend "pypar" adds in fp32. The mean's factor goes into the
    former pass, or into the collective: each element of the result depends on that element of each rank alone.
    """

    def __init__(
        self, *, average: bool = False, comm_dtype: torch.dtype | None = None, scatter: bool = False
    ) -> None:
        if comm_dtype is not None and comm_dtype not in _TRAVELS:
            raise ValueError(
                f"comm_dtype ({comm_dtype}) must be torch.float32, torch.bfloat16 or torch.float16, or None to "
                "send gradients in their own dtype"
            )
        self.average, self.comm_dtype, self.scatter = average, comm_dtype, scatter

    def reduce_start(self, bucket: Bucket, axis: Axis) -> Started:
        flat = bucket.flat if self.scatter else bucket.gradients
        part = bucket.part(axis.rank, axis.size) if self.scatter else slice(None)
        if bucket.wire is None:
            return self._reduce_in_place(flat, part, axis)
        wire = bucket.wire[: flat.numel()]
        scale_and_cast(flat, 1.0 / axis.size if self.average else 1.0, out=wire)
        started = self._sum_in_place(wire, part, axis, dist.ReduceOp.SUM)
        return _Then(started, lambda: scale_and_cast(wire[part], out=flat[part]))

    def _reduce_in_place(self, flat: Tensor, part: slice, axis: Axis) -> Started:
        if not self.average:
            return self._sum_in_place(flat, part, axis, dist.ReduceOp.SUM)
        if isinstance(axis.group, CpuProcessGroup):
            return self._sum_in_place(flat, part, axis, dist.ReduceOp.AVG)
        # A sum in fp16 may overflow where the mean does not, and a mean's terms may underflow: half of the division
        # comes before.
        before = _root(axis.size) if flat.dtype == torch.float16 else 1
        if before > 1:
            flat.div_(before)
        started = self._sum_in_place(flat, part, axis, dist.ReduceOp.SUM)
        return _Then(started, lambda: flat[part].div_(axis.size / before))

    def _sum_in_place(self, flat: Tensor, part: slice, axis: Axis, op: dist.ReduceOp.RedOpType) -> Handle:
        if self.scatter:
            return reduce_scatter_start(flat, axis, op=op, out=flat[part])
        return all_reduce_start(flat, axis, op)


def _root(size: int) -> int:
    """The least power of two that is not below the square root of size."""
    power = 1
    while power * power < size:
        power *= 2
    return power


def make_reduction(
    average: bool, comm_dtype: torch.dtype | None, scatter: bool, power_sgd_rank: int
) -> Reduction:
    if not power_sgd_rank:
        return FlatReduction(average=average, comm_dtype=comm_dtype, scatter=scatter)
    if comm_dtype is not None or scatter:
        raise ValueError(
            f"power_sgd_rank ({power_sgd_rank}) sends factors in fp32 and gives whole gradients; leave out "
            "comm_dtype and reduce_scatter, or use power_sgd_rank=0"
        )
    return PowerSGD(power_sgd_rank, average=average)


@contextlib.contextmanager
def explained(what: str, axis: Axis) -> Iterator[None]:
    """An error of communication inside also says what every rank must do alike."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} failed over axis {axis.name!r}; every one of its {axis.size} ranks must run the same number of "
            f"forward and backward passes that communicate: {error}"
        ) from error


class _Then:
    """A communication, then a pass over what it left, once."""

    def __init__(self, started: Started, finish: Callable[[], object]) -> None:
        self._started, self._finish = started, finish
        self._is_done = False

    def wait(self) -> None:
        self._started.wait()
        if not self._is_done:
            self._is_done = True
            self._finish()
