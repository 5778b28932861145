"""Linear layers cut by input features: y = sum_r x_r w_r^T, each rank r has a part of the inputs.

                  x_r           w_r       y             backward
plain             [B, T, F/R]   [D, F/R]  [B, T, D]     dx_r = dy w_r, no communication
sequence parallel [B, T, F/R]   [D, F/R]  [B, T/R, D]   dy gathered once, for dx_r and for dw_r

Sources: Megatron-LM (arXiv 1909.08053), sequence parallelism (arXiv 2205.05198).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.comm import all_gather_start, split_to
from pypar.layout import Cut, Layout, local_tensor
from pypar.mesh import Axis, as_axis
from pypar.ops.calls import called
from pypar.ops.linear import linear, linear_forward, linear_input_gradient, linear_weight_gradient
from pypar.ops.uncompiled import between_ranks, uncompiled
from pypar.tensor_parallel.sharded import ShardedLinear, autocast, check_sequence, part_length, sum_start


def row_parallel(
    x: Tensor, weight: Tensor, axis: Axis, *, sequence_parallel: bool = False, bias: Tensor | None = None
) -> Tensor:
    """The sum over the axis of x w^T, plus b once: x [..., F/R], weight [D, F/R], bias [D] the same on every
    rank.

    Returns [..., D], the same on every rank; with ``sequence_parallel`` this rank's [B, T/R, D] of it, where
    the gradient of the bias is that of this rank's rows only. ValueError: sequence_parallel on an x of fewer
    than 3 dimensions.
    """
    if axis.size > 1 and sequence_parallel:
        check_sequence("row_parallel", x)
    x, weight, bias = autocast((x, local_tensor(weight), None if bias is None else local_tensor(bias)))  # type: ignore[assignment]
    if axis.size == 1:
        return linear(x, weight, bias)
    return _over_ranks(x, weight, bias, axis, sequence_parallel)


class _RowParallel(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence_parallel: bool
    ) -> Tensor:
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        ctx.save_for_backward(x, weight)

        def compute() -> Tensor:
            out = sum_start(linear_forward(x, weight), axis, sequence_parallel).wait()
            return out if bias is None else out.add_(bias)

        return called("linear", (x, weight), compute)

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathers = ctx.sequence_parallel and (needs_x or needs_weight)
        gather = all_gather_start(dout, ctx.axis, 1) if gathers else None
        dbias = (
            dout.reshape(-1, dout.shape[-1]).sum(0) if needs_bias else None
        )  # this rank's rows, while others arrive
        whole_dout = gather.wait() if gather is not None else dout
        dx = linear_input_gradient(whole_dout, weight) if needs_x else None
        dweight = linear_weight_gradient(whole_dout, x) if needs_weight else None
        return dx, dweight, dbias, None, None


_over_ranks = between_ranks("row_parallel")(_RowParallel.apply)


class RowParallelLinear(ShardedLinear):
    """`nn.Linear(in_features, out_features)` whose input features are cut over the tp axis.

    weight [out_features, in_features/R], bias [out_features] on every rank; x and result as `row_parallel`
    has them.

    ``split_input`` takes the whole x [..., in_features], the same on every rank, of which each uses its part.
    Under sequence parallelism each rank's bias gradient is a part, as the layout's sum_over says.
    Initial values as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis | dist.ProcessGroup,
        *,
        bias: bool = False,
        sequence_parallel: bool = False,
        split_input: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.axis = as_axis(axis)
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel, self.split_input = sequence_parallel, split_input
        part = part_length("in_features", in_features, self.axis)
        self.allocate((out_features, part), out_features if bias else 0, {"dtype": dtype, "device": device})

    def layouts(self) -> dict[str, Layout]:
        cuts = (Cut(1, self.axis.names),)
        layouts = {"weight": Layout((self.out_features, self.in_features), cuts, self.sum_over)}
        if self.bias is not None:
            rows = self.axis.names if self.sequence_parallel and self.axis.size > 1 else ()
            layouts["bias"] = Layout((self.out_features,), sum_over=(*self.sum_over, *rows))
        return layouts

    def run(self, x: Tensor) -> Tensor:
        if self.split_input:
            x = split_to(x, self.axis, -1)
        weight, bias = self.part("weight"), self.part("bias")
        assert weight is not None
        return row_parallel(x, weight, self.axis, sequence_parallel=self.sequence_parallel, bias=bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split_input={self.split_input}"
