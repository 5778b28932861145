"""What grouped_matmul computes, in plain PyTorch: one product for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.rows import accumulate_dtype


def reference_forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """out [R, N]: x[r] @ weight[e].T for the rows r of group e, zeros past the last group."""
    out = x.new_zeros(len(x), weight.shape[1])
    for e, start, end in spans(counts, len(x)):
        out[start:end] = x[start:end] @ weight[e].t()
    return out


def reference_input_gradient(dout: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """dx [R, K]: dout[r] @ weight[e], zeros past the last group."""
    dx = dout.new_zeros(len(dout), weight.shape[2])
    for e, start, end in spans(counts, len(dout)):
        dx[start:end] = dout[start:end] @ weight[e]
    return dx


def reference_weight_gradient(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """dweight like weight: the sum over the rows of group e of the outer products of dout and x, in fp32."""
    dweight = torch.zeros_like(weight)
    wide = accumulate_dtype(x)
    for e, start, end in spans(counts, len(x)):
        dweight[e] = dout[start:end].to(wide).t() @ x[start:end].to(wide)
    return dweight


def reference_backward(dout: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    return (
        reference_input_gradient(dout, weight, counts),
        reference_weight_gradient(dout, x, weight, counts),
    )


def spans(counts: Tensor, num_rows: int) -> list[tuple[int, int, int]]:
    """(group, first row, end) of each group that has rows. ValueError where counts do not fit the rows."""
    found, end = [], 0
    for e, count in enumerate(counts.tolist()):
        if count < 0:
            raise ValueError(f"counts[{e}] is {count}, and a group has 0 rows or more")
        if count:
            found.append((e, end, end + count))
        end += count
    if end > num_rows:
        raise ValueError(
            f"counts add up to {end} and there are {num_rows} rows; pass the counts that belong to these rows"
        )
    return found
