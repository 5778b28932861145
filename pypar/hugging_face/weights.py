"""Weights of Hugging Face Llama-family checkpoints under pypar's names."""

import re
from collections.abc import Mapping

from torch import Tensor

from pypar.models.decoder import Decoder
from pypar.parallel.materialize import fill

_LAYER_PARTS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_TOP_PARTS = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}


def global_name(hugging_face_name: str) -> str:
    """'model.layers.3.self_attn.q_proj.weight' -> 'layers.3.attention.q.weight'.

    ValueError for a weight that pypar's decoder has no place for.
    """
    stem = hugging_face_name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    part = _LAYER_PARTS.get(layer[2]) if layer else _TOP_PARTS.get(stem)
    if part is None or stem == hugging_face_name:
        raise ValueError(
            f"{hugging_face_name} has no place in pypar's decoder, which is Llama's without biases; "
            f"it takes {', '.join([*_TOP_PARTS, *_LAYER_PARTS])}"
        )
    return f"layers.{layer[1]}.{part}.weight" if layer else f"{part}.weight"


def load_llama_weights(model: Decoder, state: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of a whole Llama state dict (Hugging Face names, full shapes) into ``model``."""
    whole = {global_name(name): tensor for name, tensor in state.items()}

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in whole:
            raise ValueError(
                f"the state dict has no weight for {name}; it holds {len(whole)} weights of other names"
            )
        if tuple(whole[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(whole[name].shape)} in the state dict but the model has {shape}; build the Decoder "
                "with the checkpoint's sizes"
            )
        return whole[name]

    fill(model, value)
