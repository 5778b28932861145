"""Cases of cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pypar.ops.cross_entropy import cross_entropy
from pypar.selftest.case import Case, Draw, Inputs, Peer

_IGNORED = -100


def cases(large: bool) -> list[Case]:
    rows, words = (8192, 32000) if large else (256, 16000)
    return [_case(rows, words, quick=True), _case(63, 5003, ignored=True), _case(1023, 111)]


def _case(rows: int, V: int, ignored: bool = False, quick: bool = False) -> Case:
    def inputs(draw: Draw) -> Inputs:
        targets = draw.whole(V, rows)
        if ignored:
            targets[::5] = _IGNORED
        return {"logits": draw.normal(rows, V) * 4, "targets": targets}

    return Case(
        name="every fifth ignored" if ignored else "every token counts",
        shape=f"rows {rows} V{V}",
        inputs=inputs,
        gradients=("logits",),
        ours=cross_entropy,
        plain=_plain,
        peer=Peer("F.cross_entropy", _plain),
        quick=quick,
    )


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="none")
    return loss if loss.dtype == torch.float64 else loss.float()
