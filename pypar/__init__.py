"""pypar: train a transformer over many devices, with the loss curve of one.

`import pypar` is light: it loads neither torch nor the native module. Every public name, and every room
(`pypar.ops`, `pypar.comm`, ...), is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pypar import comm as comm
    from pypar import context_parallel as context_parallel
    from pypar import data_parallel as data_parallel
    from pypar import hugging_face as hugging_face
    from pypar import layout as layout
    from pypar import mesh as mesh
    from pypar import models as models
    from pypar import ops as ops
    from pypar import optimizers as optimizers
    from pypar import parallel as parallel
    from pypar import pipeline_parallel as pipeline_parallel
    from pypar import recomputation as recomputation
    from pypar import tensor_parallel as tensor_parallel
    from pypar import train as train
    from pypar.context_parallel.attention import ring_attention as ring_attention
    from pypar.data_parallel import DataParallel as DataParallel
    from pypar.data_parallel import GradientBuckets as GradientBuckets
    from pypar.data_parallel.zero import zero as zero
    from pypar.hugging_face.attention import register_with_transformers as register_with_transformers
    from pypar.hugging_face.fused import apply_fused as apply_fused
    from pypar.hugging_face.shard_context import shard_context as shard_context
    from pypar.mesh import Mesh as Mesh
    from pypar.ops.attention import attention as attention
    from pypar.ops.gated import clamped_swiglu as clamped_swiglu
    from pypar.ops.gated import geglu as geglu
    from pypar.ops.gated import swiglu as swiglu
    from pypar.ops.grouped_matmul import grouped_matmul as grouped_matmul
    from pypar.ops.layer_norm import LayerNorm as LayerNorm
    from pypar.ops.layer_norm import layer_norm as layer_norm
    from pypar.ops.merge_attention import merge_attention as merge_attention
    from pypar.ops.moe_permute import moe_combine as moe_combine
    from pypar.ops.moe_permute import moe_permute as moe_permute
    from pypar.ops.rms_norm import RMSNorm as RMSNorm
    from pypar.ops.rms_norm import rms_norm as rms_norm
    from pypar.ops.rope import rope as rope
    from pypar.ops.rope import rope_tables as rope_tables
    from pypar.ops.scaled_dot_product_attention import (
        scaled_dot_product_attention as scaled_dot_product_attention,
    )
    from pypar.optimizers.adamw import AdamW as AdamW
    from pypar.optimizers.grad_scaler import GradScaler as GradScaler
    from pypar.optimizers.muon import Muon as Muon
    from pypar.optimizers.on_disk import OnDisk as OnDisk
    from pypar.parallel.apply import parallelize as parallelize
    from pypar.recomputation.apply import offload_activations as offload_activations
    from pypar.recomputation.apply import recompute as recompute
    from pypar.recomputation.plan.planner import plan_activations as plan_activations
    from pypar.recomputation.tiles import tiled as tiled
    from pypar.tensor_parallel.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

__version__ = "0.1.0"

_HOME_OF_NAME = {
    "AdamW": "pypar.optimizers.adamw",
    "DataParallel": "pypar.data_parallel",
    "GradScaler": "pypar.optimizers.grad_scaler",
    "GradientBuckets": "pypar.data_parallel",
    "LayerNorm": "pypar.ops.layer_norm",
    "Mesh": "pypar.mesh",
    "Muon": "pypar.optimizers.muon",
    "OnDisk": "pypar.optimizers.on_disk",
    "RMSNorm": "pypar.ops.rms_norm",
    "apply_fused": "pypar.hugging_face.fused",
    "attention": "pypar.ops.attention",
    "clamped_swiglu": "pypar.ops.gated",
    "geglu": "pypar.ops.gated",
    "grouped_matmul": "pypar.ops.grouped_matmul",
    "layer_norm": "pypar.ops.layer_norm",
    "linear_cross_entropy": "pypar.tensor_parallel.linear_cross_entropy",
    "merge_attention": "pypar.ops.merge_attention",
    "moe_combine": "pypar.ops.moe_permute",
    "moe_permute": "pypar.ops.moe_permute",
    "parallelize": "pypar.parallel.apply",
    "offload_activations": "pypar.recomputation.apply",
    "plan_activations": "pypar.recomputation.plan.planner",
    "recompute": "pypar.recomputation.apply",
    "register_with_transformers": "pypar.hugging_face.attention",
    "rms_norm": "pypar.ops.rms_norm",
    "ring_attention": "pypar.context_parallel.attention",
    "rope": "pypar.ops.rope",
    "rope_tables": "pypar.ops.rope",
    "scaled_dot_product_attention": "pypar.ops.scaled_dot_product_attention",
    "shard_context": "pypar.hugging_face.shard_context",
    "swiglu": "pypar.ops.gated",
    "tiled": "pypar.recomputation.tiles",
    "zero": "pypar.data_parallel.zero",
}
_ROOMS = (
    "comm",
    "context_parallel",
    "data_parallel",
    "hugging_face",
    "layout",
    "mesh",
    "models",
    "ops",
    "optimizers",
    "parallel",
    "pipeline_parallel",
    "recomputation",
    "tensor_parallel",
    "train",
)

__all__ = ["__version__", *_HOME_OF_NAME, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Loads a public name's home, or a room, on first use (PEP 562)."""
    if name in _ROOMS:
        return importlib.import_module(f"pypar.{name}")
    if name in _HOME_OF_NAME:
        value = getattr(importlib.import_module(_HOME_OF_NAME[name]), name)
        globals()[name] = value  # the next use is a plain attribute
        return value
    raise AttributeError(f"module 'pypar' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
