"""Small inputs for a model, and the tensors that it makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Verify: TypeAlias = "bool | tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any] | None"
BATCH, LENGTH = 2, 8


def example_call(model: nn.Module, verify: Verify) -> Callable[[nn.Module], Any] | None:
    """How to run the model on a few inputs: as ``verify`` says, or as transformers describes; None where neither
    does."""
    if isinstance(verify, tuple):
        positional = verify
        return lambda model: model(*positional)
    if isinstance(verify, Mapping):
        named = verify
        return lambda model: model(**named)
    if isinstance(verify, bool) or verify is None:
        inputs = _transformers_inputs(model)
        return None if inputs is None else lambda model: model(**inputs)
    if callable(verify) and not isinstance(verify, nn.Module):
        return verify
    raise ValueError(
        f"verify is a {type(verify).__name__}; give True, False, None, a tuple of the model's inputs such as "
        "(x,), a mapping of its named inputs, or a function of the model"
    )


def results(output: Any) -> list[Tensor]:
    """The floating-point tensors of what a model returns; of transformers' outputs the logits or last states."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return [value]
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _transformers_inputs(model: nn.Module) -> dict[str, Tensor | bool] | None:
    """Named inputs for a model of Hugging Face transformers, which says what it takes; None for others."""
    config: Any = getattr(model, "config", None)
    main, accepted = getattr(model, "main_input_name", None), inspect.signature(model.forward).parameters
    weight = next(model.parameters(), None)
    if config is None or main not in accepted or weight is None:
        return None
    inputs: dict[str, Tensor | bool] = {}
    vision = getattr(config, "vision_config", config)
    if main == "pixel_values" and type(size := getattr(vision, "image_size", None)) is int:
        inputs[main] = _wave((BATCH, getattr(vision, "num_channels", 3), size, size), weight)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        inputs[main] = _wave((BATCH, config.num_mel_bins, 2 * config.max_source_positions), weight)
    elif main != "input_ids":
        return None
    for name in ("input_ids", "decoder_input_ids"):
        if name == main or (
            name in accepted and getattr(config, "is_encoder_decoder", False) and name != "input_ids"
        ):
            ids = _token_ids(model, config, weight.device)
            if ids is None:
                return None
            inputs[name] = ids
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _token_ids(model: nn.Module, config: Any, device: torch.device) -> Tensor | None:
    """Ordinary token ids [BATCH, LENGTH] from all over the vocabulary, none that the configuration gives a meaning."""
    try:
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        return None
    special = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))
               and type(value) is int}  # fmt: skip
    ordinary = [i for i in range(min(size, 1 << 16)) if i not in special] or [0]
    chosen = [ordinary[i * len(ordinary) // (BATCH * LENGTH)] for i in range(BATCH * LENGTH)]
    mixed = [chosen[i * 7 % len(chosen)] for i in range(len(chosen))]
    return torch.tensor(mixed, device=device).view(BATCH, LENGTH)


def _wave(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Values between -1 and 1 that look like noise, the same on every rank, in the device and dtype of ``like``."""
    return wave(shape).to(like)


def wave(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Values between -1 and 1 that look like noise and are always the same."""
    return torch.cos(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) ** 1.5).view(shape)
