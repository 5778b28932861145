"""Root mean square norms of transformers by `pypar.rms_norm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pypar.hugging_face.fused.recognition import (
    Swap,
    Verdict,
    covered,
    device_of,
    difference,
    fused_class,
    is_same,
    known,
    numbers,
    stand_in,
)
from pypar.ops.rms_norm import rms_norm

OPERATOR = "pypar.rms_norm"
_WIDTH = 8  # of the rows of a trial


def _like_llama(original: Any) -> Mapping[str, Any]:
    """weight * (the normalised row, rounded to x's dtype): of the dtype that torch promotes the two to."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)

    return {"forward": forward}


def _like_gpt_oss(original: Any) -> Mapping[str, Any]:
    """(weight * the normalised row) rounded to x's dtype."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, _beside(self.weight, hidden_states), self.variance_epsilon)

    return {"forward": forward}


def _like_gemma(original: Any) -> Mapping[str, Any]:
    """((1 + weight) * the normalised row) rounded to x's dtype."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, _beside(self.weight, x), self.eps, weight_offset=1.0)

    return {"forward": forward}


def _beside(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in a dtype that rms_norm takes: x's or fp32."""
    return weight if weight.dtype == x.dtype else weight.float()


_KNOWN = {
    "llama.LlamaRMSNorm": Swap("norm", OPERATOR, _like_llama),
    "gpt_oss.GptOssRMSNorm": Swap("norm", OPERATOR, _like_gpt_oss),
    "gemma2.Gemma2RMSNorm": Swap("norm", OPERATOR, _like_gemma),
}


def norm_verdict(module: nn.Module) -> Verdict | None:
    """None where the module is no norm that pypar knows."""
    forward = type(module).forward
    swap = next((swap for path, swap in _KNOWN.items() if is_same(forward, known(f"{path}.forward"))), None)
    return None if swap is None else Verdict(swap, covered(module) or _difference(module, swap))


def _difference(module: nn.Module, swap: Swap) -> str:
    def of(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight: forward(stand_in(module, {"weight": weight}, {}), x)

    device = device_of(module)
    x, weight = numbers(3, _WIDTH, seed=0, device=device), numbers(_WIDTH, seed=1, device=device)
    fused = fused_class(type(module), swap)
    return difference(of(type(module).forward), of(fused.forward), x, weight)
