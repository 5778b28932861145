"""Cases of cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pypar.ops.cross_entropy import cross_entropy
from pypar.selftest.case import Case, Draw, Inputs, Peer

IGNORED = -100


def cases(large: bool) -> list[Case]:
    rows, words = (8192, 32000) if large else (256, 16000)
    return [case((rows, words), quick=True), case((63, 5003), ignored=True, strided=True), case((1023, 111))]


def small_cases() -> list[Case]:
    """Sizes for interpreters of GPU kernels; every token counts, so that every byte moves."""
    return [case((3, 1023), quick=True), case((2, 5, 24)), case((2, 4801), strided=True), case((7, 1))]


def kernel_cases() -> list[Case]:
    """The same with tokens that are not read."""
    return [case((7, 603), ignored=True, quick=True), case((6, 63), ignored=True, strided=True)]


def compiled_cases() -> list[Case]:
    """Vocabularies of models, whose machine code is looked at; as few rows as will do."""
    return [case((2, 128256)), case((2, 50257)), case((2, 1000)), case((2, 96))]


def case(shape: tuple[int, ...], ignored: bool = False, strided: bool = False, quick: bool = False) -> Case:
    """logits of this shape; ignored: every fifth target; strided: the rows of logits are parts of longer ones."""

    def inputs(draw: Draw) -> Inputs:
        logits = (draw.normal(*shape[:-1], shape[-1] + 5) * 4)[..., 2 : shape[-1] + 2]
        targets = draw.whole(max(1, shape[-1]), *shape[:-1])
        if ignored:
            targets.flatten()[::5] = IGNORED
        return {"logits": logits if strided else logits.contiguous(), "targets": targets}

    return Case(
        name="every fifth ignored" if ignored else "every token counts",
        shape=f"logits {list(shape)}",
        inputs=inputs,
        gradients=("logits",),
        ours=cross_entropy,
        plain=plain,
        peer=Peer("F.cross_entropy", plain),
        quick=quick,
    )


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return loss if loss.dtype == torch.float64 else loss.float()
