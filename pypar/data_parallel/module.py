"""A module whose gradients are the mean over ranks when backward returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from pypar.data_parallel.buckets import GradientBuckets
from pypar.data_parallel.reduction import explained
from pypar.mesh import Axis, as_axis

_BROADCAST_BYTES = 25 << 20


class DataParallel(nn.Module):
    """Drop-in for torch's DistributedDataParallel.

        model = pypar.DataParallel(model)               # all ranks, or a group, or mesh.data
        for batch in batches:
            optimizer.zero_grad()
            with model.no_sync():
                for microbatch in batch[:-1]:
                    loss(model, microbatch).backward()  # adds locally, no communication
            loss(model, batch[-1]).backward()           # reduces; param.grad is the mean over the ranks
            optimizer.step()

    Parameters and buffers are taken from the group's first rank when this is made. With ``broadcast_buffers`` the
    buffers are taken from it again before a forward that follows a training step. The state_dict is that of
    DistributedDataParallel: ``module.`` before every name.

    Gradients add up over several backwards until `zero_grad()`, as they do without it. A parameter that this step
    did not use, or that was frozen, counts as zero on the ranks where that is so, and its gradient is a tensor of
    zeros where no rank used it. Every rank must run the same number of backwards; where one runs fewer, the others
    get a RuntimeError that names it once the group's time-out is over, or when it calls something else or ends.

    With ``gradient_as_bucket_view`` (the default here) param.grad is a part of a bucket; without it, a copy. For
    bucket sizes, comm_dtype and power_sgd_rank see `GradientBuckets`. torch.autograd.grad does not reduce.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Axis | dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = 25 << 20,
        first_bucket_bytes: int = 1 << 20,
        comm_dtype: torch.dtype | None = None,
        gradient_as_bucket_view: bool = True,
        broadcast_buffers: bool = True,
        power_sgd_rank: int = 0,
    ) -> None:
        super().__init__()
        axis = _axis_of(group)
        _check(module)
        self.module, self.axis = module, axis
        self.gradient_as_bucket_view, self.broadcast_buffers = gradient_as_bucket_view, broadcast_buffers
        _take_from_first([*module.parameters(), *(module.buffers() if broadcast_buffers else ())], axis)
        self._buckets = GradientBuckets(
            module.parameters(),
            axis,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            average=True,
            comm_dtype=comm_dtype,
            power_sgd_rank=power_sgd_rank,
        )
        self._buckets.on_reduction(self._finish_with_backward)
        self._buffers_may_differ = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.broadcast_buffers and self._buffers_may_differ:
            with explained("taking the buffers of the first rank", self.axis):
                _take_from_first(list(self.module.buffers()), self.axis)
        self._buffers_may_differ = torch.is_grad_enabled() and not self._buckets.is_accumulating
        return self.module(*inputs, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward in here adds to the gradients and starts no communication."""
        with self._buckets.accumulate():
            yield

    def close(self) -> None:
        """Take the hooks off the module's parameters, so that it may be wrapped anew."""
        self._buckets.close()

    def join(self, *_: Any, **__: Any) -> Any:
        """Not there: raises ValueError."""
        raise ValueError(
            "DataParallel has no join(): every rank must run the same number of steps; cut the data evenly "
            "(torch.utils.data.DistributedSampler does, with drop_last=True), or leave out the last batches everywhere"
        )

    def __getstate__(self) -> Any:
        """Asked for by copy and pickle."""
        raise ValueError(
            "a DataParallel is not copied or pickled, for its hooks and buckets belong to this process; copy "
            "model.module and wrap the copy, or save model.state_dict()"
        )

    def _finish_with_backward(self) -> None:
        """Called inside backward at its first gradient."""
        Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self._buckets.finish()
        self._buckets.carry_over()
        if not self.gradient_as_bucket_view:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()


def _axis_of(group: Axis | dist.ProcessGroup | None) -> Axis:
    if group is not None:
        return as_axis(group)
    if not dist.is_initialized():
        raise ValueError(
            "DataParallel needs a group of ranks, and torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, under torchrun"
        )
    assert dist.group.WORLD is not None
    return Axis.of(dist.group.WORLD, "data")


def _check(module: nn.Module) -> None:
    for name, inner in module.named_modules():
        if isinstance(inner, (DataParallel, nn.parallel.DistributedDataParallel)):
            where = f"its part {name!r}" if name else "the module"
            raise ValueError(
                f"{where} is a {type(inner).__name__} already, and gradients would be reduced twice; wrap the plain "
                "model once"
            )
    lazy = [n for n, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]!r} has no shape yet; run one forward pass before")


@torch.no_grad()
def _take_from_first(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Overwrite tensors with those of the axis's first rank, by dtype and device, some MiB at a time.

    A tensor that is the same already is not written: backward may have saved it.
    """
    if axis.size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        begin = num_bytes = 0
        for end, tensor in enumerate(group, 1):
            num_bytes += tensor.nbytes
            if num_bytes >= _BROADCAST_BYTES or end == len(group):
                _broadcast(group[begin:end], axis)
                begin, num_bytes = end, 0


def _broadcast(tensors: Sequence[Tensor], axis: Axis) -> None:
    flat = torch.cat([x.detach().reshape(-1) for x in tensors])
    axis.traffic.record("broadcast", flat.nbytes if axis.rank == 0 else 0)
    dist.broadcast(flat, axis.ranks[0], group=axis.group)
    if axis.rank == 0:
        return
    for tensor, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        received = part.view(tensor.shape)
        if not torch.equal(tensor, received):
            tensor.copy_(received)
