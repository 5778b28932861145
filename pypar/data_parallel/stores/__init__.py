"""Every store by the name that ``store.name`` gives it, and how a run gets its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from pypar.data_parallel.config import StoreConfig
from pypar.data_parallel.replicated import Replicated
from pypar.data_parallel.store import Store
from pypar.mesh import Mesh
from pypar.ops.backend import unknown_name

# (named parameters of this rank's part of the model, mesh, bytes of a bucket, the section) -> the store
MakeStore = Callable[[Iterable[tuple[str, nn.Parameter]], Mesh, int, StoreConfig], Store]


def _replicated(
    named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, bucket_bytes: int, config: StoreConfig
) -> Store:
    return Replicated(named, mesh, bucket_bytes=bucket_bytes)


STORES: dict[str, MakeStore] = {
    "replicated": _replicated,
}


def store_of(
    config: StoreConfig, named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, *, bucket_bytes: int
) -> Store:
    """The store that a configuration names, over these parameters; every rank of the mesh calls it at the same time.

    ValueError where there is none of that name.
    """
    if config.name not in STORES:
        raise ValueError(unknown_name("store", config.name, sorted(STORES)))
    return STORES[config.name](named, mesh, bucket_bytes, config)
