"""Inputs of a model in the dtype that it computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def cast_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on convert the floating-point tensors that a forward of the model is given."""

    def cast(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
        )

    model.register_forward_pre_hook(cast, with_kwargs=True, prepend=True)
