"""Every store by its name, and how a run gets its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pypar.blocks import global_parameters
from pypar.data_parallel.config import MemoryConfig
from pypar.data_parallel.replicated import Replicated
from pypar.data_parallel.store import Store
from pypar.mesh import Mesh
from pypar.settings import num_bytes

# (this rank's stages of the model, mesh, bytes of a bucket, the section) -> the store
MakeStore = Callable[[Sequence[nn.Module], Mesh, int, MemoryConfig], Store]


def _replicated(models: Sequence[nn.Module], mesh: Mesh, bucket_bytes: int, config: MemoryConfig) -> Store:
    named = [each for model in models for each in global_parameters(model)]
    return Replicated(named, mesh, bucket_bytes=bucket_bytes)


def _zero(models: Sequence[nn.Module], mesh: Mesh, bucket_bytes: int, config: MemoryConfig) -> Store:
    from pypar.data_parallel.zero import Zero

    return Zero(
        models,
        mesh,
        stage=config.zero,
        shard_size=config.shard_size,
        reshard=config.reshard,
        average=False,  # the loss is scaled already
        bucket_bytes=bucket_bytes,
        ends_with_backward=False,
        offload="chunks" if config.offload == "chunks" else "none",
        device_bytes=num_bytes(config.device_bytes) if config.device_bytes else None,
    )


STORES: dict[str, MakeStore] = {
    "replicated": _replicated,
    "zero": _zero,
}


def store_of(config: MemoryConfig, models: Sequence[nn.Module], mesh: Mesh, *, bucket_bytes: int) -> Store:
    """The store that a configuration asks for, of these stages; every rank of the mesh calls it at the same time.

    A store that acts on blocks is called by the stages from then on.
    """
    is_zero = config.zero or config.offload == "chunks"
    return STORES["zero" if is_zero else "replicated"](models, mesh, bucket_bytes, config)
