"""What a kernel loads and stores, counted in Triton's interpreter (TRITON_INTERPRET=1 in the environment)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pypar.kernels.launch import Launch, in_fp32, tensors_of


@dataclass(frozen=True)
class Moved:
    """How often the elements of a tensor were loaded and stored, the most often counted of them."""

    name: str
    num_elements: int
    element_bytes: int
    most_loads: int
    most_stores: int
    num_moved: int  # loads and stores of all its elements
    num_touched: int  # elements that were loaded, and those that were stored


def count(launches: list[Launch]) -> list[Moved]:
    """Runs launches in Triton's interpreter; one entry for each tensor among their arguments."""
    from triton.runtime.interpreter import interpreter_builder as builder

    tensors: dict[int, tuple[str, Tensor, int]] = {}
    run = in_fp32(launches)
    for launch, copied in zip(launches, run, strict=True):
        given = tensors_of(launch)
        for name, x in tensors_of(copied).items():
            if x.numel():
                tensors.setdefault(x.data_ptr(), (name, x, given[name].element_size()))
    addresses: dict[str, list[np.ndarray]] = {"loads": [], "stores": []}
    originals = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        is_taken = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # which may be numbers
        addresses[kind].append(pointers.data[is_taken])

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        note("loads", pointers, mask)
        return originals[0](pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("stores", pointers, mask)
        return originals[1](pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        for launch in run:
            launch.run()
    finally:
        del builder.create_masked_load, builder.create_masked_store
    touched = {kind: np.concatenate([*found, np.zeros(0, np.uint64)]) for kind, found in addresses.items()}
    all_elements = {name: _addresses(x) for name, x, _ in tensors.values()}
    return [_moved(name, x, size, all_elements, touched) for name, x, size in tensors.values()]


def _addresses(x: Tensor) -> np.ndarray:
    """The address of each element of x."""
    grids = np.meshgrid(*(np.arange(size) for size in x.shape), indexing="ij", sparse=True)
    offsets = sum(grid * stride for grid, stride in zip(grids, x.stride(), strict=True))
    return (x.data_ptr() + np.asarray(offsets) * x.element_size()).astype(np.uint64).ravel()


def _moved(
    name: str, x: Tensor, element_bytes: int, elements: dict[str, np.ndarray], touched: dict[str, np.ndarray]
) -> Moved:
    """What lies between its elements counts too, unless it belongs to another tensor."""
    own = elements[name]
    others = np.concatenate([found for key, found in elements.items() if key != name] + [own[:0]])
    begin, end = own.min(), own.max() + np.uint64(x.element_size())

    def counts(found: np.ndarray) -> np.ndarray:
        found = found[(found >= begin) & (found < end) & ~np.isin(found, np.setdiff1d(others, own))]
        return np.bincount((found - begin).astype(np.int64) // x.element_size(), minlength=1)

    loads, stores = counts(touched["loads"]), counts(touched["stores"])
    return Moved(
        name,
        x.numel(),
        element_bytes,
        int(loads.max()),
        int(stores.max()),
        int(loads.sum() + stores.sum()),
        int((loads > 0).sum() + (stores > 0).sum()),
    )
