"""Cases of grouped_matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.grouped_matmul import grouped_matmul
from pypar.selftest.case import Case, Draw, Inputs, Peer

FEW = (3, 0, 16, 1, 9, 5, 0, 12)


def cases(large: bool) -> list[Case]:
    size = 2048 if large else 256
    return [
        case(FEW * (8 if large else 1), 2 * size, size, quick=True),
        case((128, 60, 0, 33, 200), size, 2 * size, transposed=True),
        case((7, 0, 40), 111, 63, unused=5, strided=True),
    ]


def kernel_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels."""
    return [
        case((3, 0, 20, 1), 40, 24, quick=True),
        case((5, 0, 2), 33, 63, unused=4, strided=True),
        case((0, 35), 16, 70, transposed=True),
    ]


def compiled_cases() -> list[Case]:
    """Experts of models, whose machine code is looked at; as few rows as will do."""
    return [case((1, 1), 4096, 1408), case((1, 1), 1000, 70, transposed=True)]


def case(
    counts: tuple[int, ...],
    in_features: int,
    out_features: int,
    *,
    transposed: bool = False,
    strided: bool = False,
    unused: int = 0,
    quick: bool = False,
) -> Case:
    """A group for each of counts. transposed: weight is kept as [E, K, N]; strided: rows of x are parts of longer ones;
    unused: rows past the last group."""
    E, rows = len(counts), sum(counts)

    def inputs(draw: Draw) -> Inputs:
        x = draw.normal(rows + unused, in_features + 3)[:, 1 : in_features + 1]
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        weight = draw.normal(E, *shape)
        return {
            "x": x if strided else x.contiguous(),
            "weight": weight.mT if transposed else weight,
            "counts": torch.tensor(counts, device=x.device),
        }

    flops = 2.0 * rows * in_features * out_features
    words = ["[E, K, N]"] * transposed + ["parts of longer rows"] * strided + ["unused rows"] * bool(unused)
    return Case(
        name=", ".join(words) or "[E, N, K]",
        shape=f"{E} of {min(counts)}-{max(counts)} rows, {in_features} to {out_features}",
        inputs=inputs,
        gradients=("x", "weight"),
        ours=grouped_matmul,
        plain=plain,
        peer=Peer("a loop of matmuls", plain),
        flops=(flops, 2 * flops),
        quick=quick,
    )


def plain(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    sizes = counts.tolist()
    groups = x.split([*sizes, len(x) - sum(sizes)])
    outs = [group @ matrix.t() for group, matrix in zip(groups[:-1], weight, strict=True)]
    return torch.cat([*outs, x.new_zeros(len(groups[-1]), weight.shape[1])])
