"""Linear layers cut by output features: y_r = x w_r^T, each rank r has a part of the outputs.

                  x             w_r       y_r           backward
plain             [B, T, D]     [F/R, D]  [B, T, F/R]   dx = all_reduce(dy_r w_r)
sequence parallel [B, T/R, D]   [F/R, D]  [B, T, F/R]   dx = reduce_scatter(dy_r w_r), x gathered again for dw

Sources: Megatron-LM (arXiv 1909.08053), sequence parallelism (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pypar.comm import all_gather_start, gather_replicated
from pypar.layout import Cut, Layout, local_tensor
from pypar.mesh import Axis, as_axis
from pypar.ops.calls import called
from pypar.ops.linear import linear, linear_forward, linear_input_gradient, linear_weight_gradient
from pypar.ops.uncompiled import between_ranks, uncompiled
from pypar.tensor_parallel.sharded import ShardedLinear, autocast, check_sequence, part_length, sum_start
from pypar.tensor_parallel.unit import Unit


def column_parallel(
    x: Tensor,
    weights: Sequence[Tensor],
    axis: Axis,
    *,
    sequence_parallel: bool = False,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several column-parallel linears over one input: x w^T (+ b) for each weight [F/R, D] (bias [F/R]).

    x is [..., D], the same on every rank; with ``sequence_parallel`` this rank's [B, T/R, D], gathered along
    dim 1. Returns [..., F/R] for each weight. Backward sums the input gradient over the axis in one
    collective for all weights, which is under way while the weight gradients are computed.

    ValueError: a number of biases that is not that of the weights; sequence_parallel on an x of fewer than 3
    dimensions.
    """
    if biases is None:
        biases = (None,) * len(weights)
    elif len(biases) != len(weights):
        raise ValueError(
            f"{len(biases)} biases for {len(weights)} weights; give one for each, None where there is none"
        )
    if axis.size > 1 and sequence_parallel:
        check_sequence("column_parallel", x)
    weights = [local_tensor(w) for w in weights]
    biases = [None if b is None else local_tensor(b) for b in biases]
    tensors: Any = autocast((x, *weights, *biases))
    x, weights, biases = tensors[0], tensors[1 : 1 + len(weights)], tensors[1 + len(weights) :]
    if axis.size == 1:
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    return _over_ranks(x, axis, sequence_parallel, *weights, *biases)


class _ColumnParallel(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, sequence_parallel: bool, *weights_and_biases: Any
    ) -> tuple[Tensor, ...]:
        num_weights = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:num_weights], weights_and_biases[num_weights:]
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)  # with sequence parallelism only the shard of x is kept

        def compute() -> tuple[Tensor, ...]:
            whole_x = all_gather_start(x, axis, 1).wait() if sequence_parallel else x
            outs = tuple(linear_forward(whole_x, w) for w in weights)
            for out, bias in zip(outs, biases, strict=True):
                if bias is not None:
                    out.add_(bias)
            return outs

        return called("linear", (x, *weights), compute)

    @staticmethod
    @uncompiled("it is communication between ranks")
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        axis, sequence_parallel, n = ctx.axis, ctx.sequence_parallel, len(weights)
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_w, needs_b = needs[:n], needs[n:]
        gather = all_gather_start(x, axis, 1) if sequence_parallel and any(needs_w) else None
        reduction = None
        if needs_x:
            reduction = sum_start(_input_gradient(douts, weights), axis, sequence_parallel)
        whole_x = gather.wait() if gather is not None else x
        dweights = [
            linear_weight_gradient(dout, whole_x) if dout is not None and needed else None
            for dout, needed in zip(douts, needs_w, strict=True)
        ]
        dbiases = [
            dout.reshape(-1, dout.shape[-1]).sum(0) if dout is not None and needed else None
            for dout, needed in zip(douts, needs_b, strict=True)
        ]
        return reduction.wait() if reduction is not None else None, None, None, *dweights, *dbiases


_over_ranks = between_ranks("column_parallel")(_ColumnParallel.apply)


def _input_gradient(douts: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """sum_i dout_i w_i, summed into the first product's buffer."""
    dx: Tensor | None = None
    for dout, weight in zip(douts, weights, strict=True):
        if dout is not None:
            part = linear_input_gradient(dout, weight)
            dx = part if dx is None else dx.add_(part)
    assert dx is not None, "autograd runs backward only where some output has a gradient"
    return dx


class ColumnParallelLinear(ShardedLinear):
    """`nn.Linear(in_features, out_features)` whose output features are cut over the tp axis.

    weight [out_features/R, in_features], bias [out_features/R]; x and result as `column_parallel` has them.

    ``gather_output`` gives the whole [..., out_features] to every rank, which all must use in the same way.
    The initial values are parts of those of the whole `nn.Linear` drawn from torch's global generator, which
    must be in the same state on every rank of the axis (`reset_parameters` takes another one).
    """

    unit: Unit | None = None  # with other layers over the same input

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis | dist.ProcessGroup,
        *,
        bias: bool = False,
        sequence_parallel: bool = False,
        gather_output: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.axis = as_axis(axis)
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel, self.gather_output = sequence_parallel, gather_output
        part = part_length("out_features", out_features, self.axis)
        self.allocate((part, in_features), part if bias else 0, {"dtype": dtype, "device": device})

    def layouts(self) -> dict[str, Layout]:
        cuts = (Cut(0, self.axis.names),)
        layouts = {"weight": Layout((self.out_features, self.in_features), cuts, self.sum_over)}
        if self.bias is not None:
            layouts["bias"] = Layout((self.out_features,), cuts, self.sum_over)
        return layouts

    def run(self, x: Tensor) -> Tensor:
        y = self.unit.output(self, x, _computed) if self.unit is not None else _computed(x, (self,))[0]
        return gather_replicated(y, self.axis, -1) if self.gather_output else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gather_output={self.gather_output}"


def _computed(x: Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """The results of layers that share axis and mode, in one `column_parallel`."""
    weights: Any = [layer.part("weight") for layer in layers]
    biases = [layer.part("bias") for layer in layers]
    first = layers[0]
    return column_parallel(x, weights, first.axis, sequence_parallel=first.sequence_parallel, biases=biases)
