"""A safetensors file that is written one tensor at a time, in any order.

The format: the header's length in 8 bytes (little-endian), the header as JSON ({name: {dtype, shape, data_offsets}}),
then the tensors' bytes. It is written under another name and renamed when it is whole.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED = 8  # bytes; the tensors begin there


def can_hold(x: object) -> bool:
    """Whether it is a tensor of a dtype that is written here."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES


class SafetensorsFile:
    """``tensors`` tell names, shapes and dtypes; their values come by `write`, then `finish` is called."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        self._missing = set(tensors)
        end = 0
        for name, x in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # so that each is aligned
            begin, end = end, end + x.numel() * x.itemsize
            self._offsets[name] = begin
            header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._begin = 8 + len(text)
        self._file = open(self._partial, "wb")  # noqa: SIM115 (open until finish)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        self._file.seek(self._begin + self._offsets[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def finish(self) -> None:
        assert not self._missing, f"{sorted(self._missing)} were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
