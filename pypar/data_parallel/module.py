"""A module whose gradients are the mean over ranks when backward returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from pypar.comm import all_reduce_start
from pypar.comm.identical import first_difference
from pypar.data_parallel.buckets import GradientBuckets
from pypar.data_parallel.reduction import explained
from pypar.layout import local_tensor
from pypar.mesh import Axis, as_axis
from pypar.ops.uncompiled import between_ranks, uncompiled
from pypar.sharded import named_parts, refuse_different_parts

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
    did not use counts as zero on the ranks where that is so, and its gradient is a tensor of zeros where no rank
    used it. One that is frozen later on (requires_grad_(False), on every rank) keeps no gradient, so that no
    optimizer moves it. Every rank must run the same number of backwards; where one runs fewer, the others get a
    RuntimeError that names it once the group's time-out is over, or when it calls something else or ends.

    With ``find_unused_parameters`` what no rank used has the gradient None, as with DistributedDataParallel, and no
    optimizer moves it. Costs an all-reduce more a step, of a byte a parameter; where a rank did not use all of
    them, it waits for its GPU.

    With ``gradient_as_bucket_view`` (the default here) param.grad is a part of a bucket; without it, a copy. For
    bucket sizes, comm_dtype and power_sgd_rank see `GradientBuckets`. torch.autograd.grad does not reduce. The
    module's parameters are looked up once: convert, move and replace them before.

    Raises ValueError where ranks hold different models, for modules that are sharded or reduced by something else
    already, or that have nothing to train.
    """

    def __init__(  # noqa: PLR0913 - one argument an option
        self,
        module: nn.Module,
        group: Axis | dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = 25 << 20,
        first_bucket_bytes: int = 1 << 20,
        comm_dtype: torch.dtype | None = None,
        gradient_as_bucket_view: bool = True,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        power_sgd_rank: int = 0,
    ) -> None:
        super().__init__()
        _check(module)
        axis = _axis_of(group)
        _check_alike(module, axis)
        self.module, self.axis = module, axis
        self.gradient_as_bucket_view, self.broadcast_buffers = gradient_as_bucket_view, broadcast_buffers
        self.find_unused_parameters = find_unused_parameters
        _take_from_first([*module.parameters(), *(module.buffers() if broadcast_buffers else ())], axis)
        without_gradient = [p for p in module.parameters() if p.grad is None]
        self._buckets = GradientBuckets(
            module.parameters(),
            axis,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            average=True,
            comm_dtype=comm_dtype,
            power_sgd_rank=power_sgd_rank,
        )
        if find_unused_parameters:  # the buckets gave them one
            for parameter in without_gradient:
                parameter.grad = None
        self._buckets.on_reduction(self._finish_with_backward)
        self._buffers_may_differ = True
        self._is_closed = False
        self._in_backward = False
        self._without_gradient: list[nn.Parameter] = []  # frozen, and have none

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self._before_forward()
        return self.module(*inputs, **kwargs)

    @between_ranks("DataParallel's forward")
    def _before_forward(self) -> None:
        if torch.is_grad_enabled():
            self._refuse_use()
        if self.broadcast_buffers and self._buffers_may_differ:
            with explained("taking the buffers of the first rank", self.axis):
                _take_from_first(list(self.module.buffers()), self.axis)
        self._buffers_may_differ = torch.is_grad_enabled() and not self._buckets.is_accumulating

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward in here adds to the gradients and starts no communication."""
        with self._buckets.accumulate():
            yield

    @uncompiled("it takes hooks off")
    def close(self) -> None:
        """Take the hooks off the module's parameters, so that it may be wrapped anew."""
        self._buckets.close()
        self._is_closed = True

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as every module does; ValueError for assign=True, which replaces parameters."""
        if assign:
            raise ValueError(
                "load_state_dict(assign=True) would replace the parameters whose gradients are reduced; load without "
                "assign, or load into the module before DataParallel is made of it"
            )
        return super().load_state_dict(state_dict, strict=strict)

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
        self._in_backward = True
        self._without_gradient = [
            p for p in self.module.parameters() if not p.requires_grad and p.grad is None
        ]
        Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        parameters = list(self.module.parameters()) if self.find_unused_parameters else []
        used = [p.grad is not None for p in parameters]  # finish() gives all of them a gradient
        self._buckets.finish()
        self._buckets.carry_over()
        if parameters:
            self._without_gradient += unused_everywhere(parameters, used, self.axis)
        for parameter in self._without_gradient:
            parameter.grad = None
        self._in_backward = False
        if not self.gradient_as_bucket_view:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def _refuse_use(self) -> None:
        if self._is_closed:
            raise RuntimeError(
                "this DataParallel was closed and reduces nothing; use its module, or wrap that anew"
            )
        # A backward that recomputes may come here while it reduces.
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                "an earlier backward ended with an error while gradients were being reduced, and what the ranks hold "
                "may differ; end the job and go on from a checkpoint"
            )


def unused_everywhere(
    parameters: Sequence[nn.Parameter], used: Sequence[bool], axis: Axis
) -> list[nn.Parameter]:
    """Those of the parameters, the same on all ranks, that no rank has `used`, which tells for each."""
    flags, device = torch.tensor(used, dtype=torch.uint8), parameters[0].device
    if device.type == "cuda":  # a copy from other memory would wait for the device
        flags = flags.pin_memory().to(device, non_blocking=True)
    with explained("asking which parameters no rank used", axis):
        flags = all_reduce_start(flags, axis, dist.ReduceOp.MAX).wait()
    if all(used):
        return []
    return [p for p, is_used in zip(parameters, flags.tolist(), strict=True) if not is_used]


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
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"DataParallel wraps a torch.nn.Module, not a {type(module).__name__}; pass the model itself"
        )
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
    sharded = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise ValueError(
            f"parameter {sharded[0]!r} is a DTensor, and what shards it (fully_shard, parallelize_module) reduces its "
            "gradient; use that alone, over all data ranks, or wrap the plain model"
        )


def _check_alike(module: nn.Module, axis: Axis) -> None:
    named = named_parts([*module.named_parameters(), *module.named_buffers()])
    difference = first_difference(named, axis, values=False)
    if difference is not None:
        refuse_different_parts("DataParallel", module.named_parameters(), axis)
        raise ValueError(
            f"the models are not the same on all {axis.size} ranks of axis {axis.name!r}: {difference} of parameters "
            "and buffers; make every rank's from one configuration"
        )


@torch.no_grad()
def _take_from_first(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Overwrite tensors with those of the axis's first rank, by dtype and device, some MiB at a time.

    On a CPU a tensor that is the same already is not written: backward may have saved it.
    """
    if axis.size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in map(local_tensor, tensors):
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
        if tensor.is_cuda or not torch.equal(tensor, received):  # asking a GPU would synchronise it
            tensor.copy_(received)
