"""Cases of linear_cross_entropy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pypar.ops.linear_cross_entropy import linear_cross_entropy
from pypar.selftest.case import Case, Draw, Inputs, Peer

IGNORED = -100
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "each token": {"reduction": "none"},
    "softcap": {"softcap": 2.0, "reduction": "none"},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"},
}


def cases(large: bool) -> list[Case]:
    tokens, width, words = (4096, 512, 16384) if large else (256, 128, 4096)
    return [
        case((tokens,), width, words, quick=True),
        case((3, 111), 63, 1023, "each token", bias=True, ignored=True),
        case((67,), 16, 211, "softcap", bias=True),
        case((255,), 33, 517, "smoothing and z-loss", weighted=True, ignored=True),
    ]


def kernel_cases() -> list[Case]:
    """Sizes and options for interpreters of GPU kernels; the first has rows of two blocks."""
    return [
        case((3,), 4, 4200, "smoothing and z-loss", bias=True, quick=True),
        case((5, 2), 8, 67, "softcap", bias=True, weighted=True, ignored=True),
        case((9,), 16, 131, "mean", ignored=True),
        case((7,), 8, 63, "each token"),
        case((6,), 8, 33, "sum", bias=True),
    ]


def compiled_cases() -> list[Case]:
    """Vocabularies of models, whose machine code is looked at; as few tokens and as narrow as will do."""
    return [
        case((2,), 16, 128256),
        case((2,), 16, 50257, "smoothing and z-loss", bias=True),
        case((2,), 16, 1000, "softcap"),
    ]


def case(
    shape: tuple[int, ...],
    width: int,
    words: int,
    options: str = "mean",
    *,
    bias: bool = False,
    weighted: bool = False,
    ignored: bool = False,
    quick: bool = False,
) -> Case:
    """hidden [*shape, width], weight [words, width]; options: a name of OPTIONS; ignored: every fifth target."""

    def inputs(draw: Draw) -> Inputs:
        hidden, weight = draw.normal(*shape, width), draw.normal(words, width) * (2 / width**0.5)
        target = draw.whole(words, *shape)
        if ignored:
            target.flatten()[::5] = IGNORED
        given = {"hidden": hidden, "weight": weight, "target": target}
        if bias:
            given["bias"] = draw.normal(words)
        if weighted:
            given["token_weights"] = draw.uniform(*shape)
        return given

    chosen = OPTIONS[options]
    return Case(
        name=options + ", bias" * bias + ", weights" * weighted + ", ignored" * ignored,
        shape=f"hidden {[*shape, width]}, V {words}",
        inputs=inputs,
        gradients=("hidden", "weight", "bias") if bias else ("hidden", "weight"),
        ours=_with(linear_cross_entropy, chosen),
        plain=_with(plain, chosen),
        peer=Peer("F.linear, F.cross_entropy", _with(plain, chosen)),
        flops=(2.0 * math.prod(shape) * width * words, 4.0 * math.prod(shape) * width * words),
        quick=quick,
    )


def plain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The definition, on all logits."""
    reduction, smoothing = options.get("reduction", "mean"), options.get("label_smoothing", 0.0)
    z_loss, softcap = options.get("z_loss", 0.0), options.get("softcap")
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    target, shape = target.flatten(), target.shape
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if reduction == "mean" and not z_loss and token_weights is None:
        return _wide(F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing))
    loss = F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
    counted = (target != IGNORED).to(loss.dtype)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square() * counted
    if token_weights is not None:
        counted = counted * token_weights.flatten()
    loss = loss * counted
    if reduction == "none":
        return _wide(loss.view(shape))
    return _wide(loss.sum() / counted.sum() if reduction == "mean" else loss.sum())


def _wide(loss: Tensor) -> Tensor:
    return loss if loss.element_size() == 8 else loss.float()


def _with(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return functools.partial(function, **options)
