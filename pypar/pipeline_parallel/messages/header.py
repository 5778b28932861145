"""What passes between two stages as bytes: a header, which says what tensors there are or why there are none, and
then the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

HEADER_BYTES = 2048  # of every header, so that its receive can be posted before it is known
ALIGNMENT = 64  # bytes; what starts on a cache line may be read as any dtype

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

Value = tuple[Tensor | None, ...]  # what travels


class TensorSpec(NamedTuple):
    """What the receiver must know of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Header:
    """A message's tensors, None where the stage returned None; `is_tuple` is False for one bare tensor.

    Where the sender could not make them, `failure` is the sentence that says why; `is_mistake`: it was a
    ValueError.
    """

    specs: tuple[TensorSpec | None, ...] = ()
    is_tuple: bool = True
    failure: str = ""
    is_mistake: bool = False

    @cached_property
    def offsets(self) -> list[int]:
        """Where each tensor that travels begins in the message's bytes; their end last, 0 for no tensor."""
        offsets, end = [], 0
        for spec in self.specs:
            if spec is not None:
                offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
                end = offsets[-1] + math.prod(spec.shape) * spec.dtype.itemsize
        return [*offsets, end]


def pack(value: Value, header: Header, buffer: Tensor, begin: int = 0) -> None:
    """Copies the tensors that `header` describes into uint8 `buffer`, from byte `begin` on."""
    for part, x in zip(unpack(header, buffer, begin), value, strict=True):
        if part is not None and x is not None:
            part.copy_(x)


def unpack(header: Header, buffer: Tensor, begin: int = 0) -> Value:
    """The opposite of `pack`: the tensors lie in `buffer`.

    They share its memory and are no views of it: autograd would take a write to one of them for a write to all.
    """
    storage, offsets = buffer.untyped_storage(), iter(header.offsets)
    return tuple(
        None
        if spec is None
        else buffer.new_empty(0, dtype=spec.dtype).set_(  # type: ignore[call-overload] # the stride may be left out
            storage, (begin + next(offsets)) // spec.dtype.itemsize, spec.shape
        )
        for spec in header.specs
    )


def describe(value: Value, is_tuple: bool = True) -> Header:
    """The header of tensors that are about to be sent."""
    return Header(
        tuple(None if x is None else TensorSpec(tuple(x.shape), x.dtype, x.requires_grad) for x in value),
        is_tuple,
    )


def encode(header: Header) -> Tensor:
    """uint8 [HEADER_BYTES]; a failure's sentence is cut to fit. ValueError for what a header cannot say."""
    for spec in header.specs:
        if spec is not None and str(spec.dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(
                f"a tensor of {spec.dtype} does not pass between pipeline stages; convert it to one of "
                f"{', '.join(_DTYPES)}"
            )
    fields = {
        "specs": [
            s and (s.shape, str(s.dtype).removeprefix("torch."), s.requires_grad) for s in header.specs
        ],
        "is_tuple": header.is_tuple,
        "failure": header.failure[: HEADER_BYTES // 8],  # a character takes at most 6 bytes in JSON's ASCII
        "is_mistake": header.is_mistake,
    }
    text = json.dumps(fields).encode()
    if len(text) > HEADER_BYTES:
        raise ValueError(
            f"a pipeline stage passes on {len(header.specs)} tensors, whose shapes take {len(text)} bytes and a "
            f"header has {HEADER_BYTES}; join some of them (torch.stack, torch.cat)"
        )
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)


def decode(header: bytes) -> Header:
    """The opposite of `encode`, from the bytes of its tensor."""
    fields = json.loads(header)
    specs = (s and TensorSpec(tuple(s[0]), _DTYPES[s[1]], s[2]) for s in fields.pop("specs"))
    return Header(specs=tuple(specs), **fields)


def as_value(returned: object, stage: int) -> tuple[Value, bool]:
    """What a stage returned as a tuple, and whether it was one; ValueError for anything else."""
    if isinstance(returned, Tensor):
        return (returned,), False
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise ValueError(
            f"stage {stage} returned a {type(returned).__name__}; what passes between pipeline stages is a tensor, "
            f"or a tuple of tensors and None"
        )
    for index, item in enumerate(returned):
        if item is not None and not isinstance(item, Tensor):
            raise ValueError(
                f"stage {stage} returned a {type(item).__name__} as item {index} of a tuple; what passes between "
                f"pipeline stages is a tensor, or a tuple of tensors and None"
            )
    return tuple(returned), True
