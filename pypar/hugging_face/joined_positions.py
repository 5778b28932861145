"""What of a transformers model joins positions outside of attention, where `shard_context` does not see it.

Such a part would work on a rank's positions as if they were the whole sequence. A model's configuration, the classes of
its modules and their forwards tell; what they do not tell, no one here knows.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Types of layers that attend, as configurations name them.
_ATTENDING = {
    "full_attention",
    "sliding_attention",
    "window_attention",
    "chunked_attention",
    "attention",
    "moe",
}
_TRAINED_LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")
_JOINING_CLASS = re.compile(
    "Mamba|SSM|R[Ww][Kk][Vv]|Recurrent|LSTM|Delta|LinearAttention|LightningAttention|ShortConv|Retention|Hyena|"
    "TokenShift|Indexer|Compressor|N[Gg]ram|BlockSparse|LSH"
)
_JOINING_PARAMETERS = {"A_log", "dt_bias", "time_decay", "time_mix_key"}
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_POOLS = (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)
_STATISTICS = (nn.BatchNorm1d, nn.InstanceNorm1d)
# Heads that read one position of the sequence, which one rank holds.
_POOLING_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def joined_positions(model: nn.Module) -> str | None:
    """What joins positions outside of attention, as the subject of a sentence; None where nothing is known to."""
    if type(model).__name__.endswith(_POOLING_HEADS):
        return "the head, which reads one position of the sequence,"
    for config in _configs(model):
        types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
        other = next((kind for kind in types if isinstance(kind, str) and kind not in _ATTENDING), None)
        if other is not None:
            return f'a layer of the type "{other}"'
        if getattr(config, "expert_capacity", None):
            return f"the capacity of experts (expert_capacity={config.expert_capacity})"
    for name, module in model.named_modules():
        reason = _of_instance(module) or _of_class(module.__class__)
        if reason is not None:
            return f"{name or 'the model'} ({type(module).__name__}), {reason},"
    return None


def scaling_by_length(model: nn.Module, last_position: int) -> str | None:
    """A rotary embedding that would depend on each rank's last position, as the subject of a sentence."""
    for config in _configs(model):
        for rope in _ropes(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
            kind = str(rope.get("rope_type", rope.get("type", "")))
            trained = rope.get("original_max_position_embeddings") or next(
                (x for x in (getattr(config, name, None) for name in _TRAINED_LENGTHS) if x), 0
            )
            if ("dynamic" in kind or kind == "longrope") and last_position >= trained:
                return f'rope_type "{kind}", which depends on the last position from {trained} on,'
    return None


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of the models of transformers in a model, each once."""
    seen: set[int] = set()
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each rotary embedding: some models have one for each type of layer."""
    if isinstance(parameters, dict):
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        yield from nested or [parameters]


def _of_instance(module: nn.Module) -> str | None:
    if isinstance(module, _CONVOLUTIONS) and module.kernel_size != (1,):
        return "a convolution over positions"
    if isinstance(module, _POOLS):
        return "a mean or maximum over positions"
    if isinstance(module, _STATISTICS):
        return "a norm over positions"
    if _JOINING_PARAMETERS & module._parameters.keys():
        return "a state that goes from position to position"
    return None


@functools.cache
def _of_class(module_class: Any) -> str | None:
    if issubclass(module_class, (nn.RNNBase, nn.RNNCellBase)) or _JOINING_CLASS.search(module_class.__name__):
        return "which goes from position to position"
    if module_class.__module__.startswith("torch.") or hasattr(module_class, "config_class"):
        return None
    try:
        source = inspect.getsource(module_class.forward)
        takes = "position_ids" in inspect.signature(module_class.forward).parameters
    except (OSError, TypeError, ValueError):
        return None
    return None if takes or "torch.arange(" not in source else "which counts positions itself"
