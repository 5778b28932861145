"""linear_cross_entropy whose vocabulary is cut over the ranks of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_gather_start
from pypar.layout import local_tensor
from pypar.mesh import Axis, as_axis
from pypar.ops import linear_cross_entropy as on_one_device
from pypar.ops.backend import choose
from pypar.ops.linear_cross_entropy import BACKENDS
from pypar.ops.linear_cross_entropy.loss import (
    LossKeywords,
    LossOptions,
    check,
)
from pypar.ops.uncompiled import between_ranks
from pypar.tensor_parallel.vocabulary_parts import loss_of_parts

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Axis | dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> Any:
    """`pypar.ops.linear_cross_entropy`, of which each rank of a group has some of the words.

    group: a mesh axis, a process group, or None for one device, which has all words. weight [V/R, H] and bias [V/R] are
    this rank's words, the words of rank 0 first; parts may differ in length. hidden, target and token_weights are the
    same on every rank, and so are the results and hidden's gradient.

    ValueError, on every rank: what `pypar.ops.linear_cross_entropy` refuses on some rank; ranks that disagree about
    shapes, dtypes or what needs a gradient.
    """
    given = {"bias": bias, "token_weights": token_weights}
    axis = None if group is None else as_axis(group)
    if axis is None or axis.size == 1:
        return on_one_device(hidden, weight, target, backend=backend, **given, **options)
    return _over_ranks(hidden, weight, target, axis, given, backend, options)


@between_ranks("linear_cross_entropy over a group")
def _over_ranks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    axis: Axis,
    given: dict[str, Tensor | None],
    backend: str | None,
    options: LossKeywords,
) -> Any:
    weight = local_tensor(weight)
    bias, token_weights = given["bias"], given["token_weights"]
    bias = None if bias is None else local_tensor(bias)
    refusal: Exception | None = None
    try:
        LossOptions(**options)
        check(hidden, weight, target, bias, token_weights)
        arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
        choose("linear_cross_entropy", BACKENDS, arguments, backend)
    except (ValueError, TypeError) as error:
        refusal = error
    sizes = _words_of_ranks(hidden, weight, bias, axis, refusal)
    return loss_of_parts(
        hidden,
        weight,
        target,
        axis,
        sizes,
        bias=bias,
        token_weights=token_weights,
        backend=backend,
        **options,
    )


def _words_of_ranks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, refusal: Exception | None
) -> list[int]:
    """How many words each rank has, after the ranks have told each other what they were given."""
    needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    dtype = _DTYPES.index(hidden.dtype) if hidden.dtype in _DTYPES else len(_DTYPES)
    alike = [*hidden.shape[-1:], hidden.numel(), dtype, bias is not None, *needs, torch.is_grad_enabled()]
    mine = torch.tensor([refusal is not None, weight.shape[0], *alike], device=hidden.device).unsqueeze(0)
    told = all_gather_start(mine, axis).wait().tolist()
    if refusal is not None:
        raise refusal
    for rank, (refused, _, *others) in enumerate(told):
        if refused:
            raise ValueError(
                f"rank {rank} of axis {axis.name} refuses its part of linear_cross_entropy; its own error says why"
            )
        if others != told[0][2:]:
            raise ValueError(
                f"ranks 0 and {rank} of axis {axis.name} call linear_cross_entropy differently: (H, numbers of hidden, "
                f"dtype, bias, what needs gradients) is {told[0][2:]} and {others}; give every rank the same hidden "
                "and the same frozen parts"
            )
    return [size for _, size, *_ in told]
