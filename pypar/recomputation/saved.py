"""What a region has for the tensors of its forward: held as they are, or slots for what is made again."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pypar.recomputation.operators import COPIED


class Held(ABC):
    """A saved tensor that is kept."""

    @abstractmethod
    def get(self) -> Tensor:
        """The tensor. RuntimeError where somebody has written into it since."""


class Whole(Held):
    """A saved tensor that is held as it is."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x.detach(), version_of(x)

    @property
    def is_written(self) -> bool:
        """Whether somebody has written into it since."""
        return version_of(self.x) != self.version

    def get(self) -> Tensor:
        check_unwritten(self.is_written, tuple(self.x.shape))
        return self.x


def check_unwritten(is_written: bool, shape: tuple[int, ...]) -> None:
    """RuntimeError where a saved tensor is another one by now."""
    if is_written:
        raise RuntimeError(
            f"a tensor {shape} that backward needs was written into after the forward; write into a copy of it"
        )


def version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Source(Protocol):
    """The region of a slot."""

    name: str
    checks: bool  # whether slots have checksums

    def run_again(self) -> None:
        """Fill the region's slots."""
        ...


class Slot:
    """The place of a saved tensor that is made again."""

    def __init__(self, source: Source, x: Tensor) -> None:
        self._source = source
        self._like = x.shape, x.dtype, x.device
        self._checksum = checksum(x) if source.checks else None
        self.x: Tensor | None = None

    def get(self) -> Tensor:
        """The tensor, for which the region's forward runs again if it has not."""
        if self.x is None:
            self._source.run_again()
        assert self.x is not None
        return self.x

    def take(self, x: Tensor) -> None:
        """RuntimeError where it is not the tensor that forward had, as far as that is known."""
        like = x.shape, x.dtype, x.device
        if like != self._like:
            raise RuntimeError(
                f"{self._source.name} computed {_shown(like)} in backward where its forward had "
                f"{_shown(self._like)}; {SAME}"
            )
        if self._checksum is not None and self._checksum != checksum(x):
            raise RuntimeError(
                f"{self._source.name} computed another tensor {_shown(like)} in backward than its forward had; "
                f"{SAME}"
            )
        self.x = x.detach()


SAME = (
    "a forward that is recomputed must do the same both times: random numbers come from torch's own generators, no "
    "cache grows (transformers: use_cache=False), nothing that it reads is written into in between"
)


def _shown(like: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = like
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


def checksum(x: Tensor) -> int:
    """Of the tensor's bytes."""
    return zlib.crc32(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@dataclass
class Result:
    """What an operator returned: its tensors, which are held, in their structure."""

    name: str
    held: list[Any]  # Held for a tensor
    structure: Any

    @classmethod
    def of(cls, name: str, outputs: Any) -> Result:
        """Of the operator `name`."""
        leaves, structure = tree_flatten(outputs)
        if name in COPIED:
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        return cls(name, [Whole(x) if isinstance(x, Tensor) else x for x in leaves], structure)

    @property
    def tensors(self) -> list[Whole]:
        """The tensors that it holds as they are."""
        return [x for x in self.held if isinstance(x, Whole)]

    def again(self) -> Any:
        """The outputs, as they were."""
        # Autograd marks what a forward returns, so each is a tensor of its own.
        leaves = [x.get().detach() if isinstance(x, Held) else x for x in self.held]
        return tree_unflatten(leaves, self.structure)
