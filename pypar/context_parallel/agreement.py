"""Whether all ranks of an axis make the same call: asked before any of its data moves."""

from __future__ import annotations

import hashlib
import weakref

import torch
from torch import Tensor

from pypar.comm import all_gather_start
from pypar.mesh import Axis

_TEXT_BYTES = 8192  # of a rank's call, where calls differ
_SHOWN = 160  # characters of one value in a message

# What an axis of GPUs has agreed on: there, each question would make the host wait for the device.
_agreed: weakref.WeakKeyDictionary[Axis, set[int]] = weakref.WeakKeyDictionary()


def agree(axis: Axis, call: dict[str, object], seed: Tensor) -> tuple[str | None, Tensor]:
    """(what differs between the ranks' calls as a sentence, None where nothing does; the first rank's seed [1]).

    Sends 16 bytes to each rank, more only where calls differ; every rank gets the same sentence. On CPUs each call
    is checked; on GPUs a call that the axis has agreed on before is not checked again.
    seed: int64 [1] on the device of the axis, negative where there is none.
    """
    digest = int.from_bytes(hashlib.blake2b(repr(call).encode(), digest_size=8).digest(), "little") >> 2
    known = _agreed.setdefault(axis, set()) if seed.is_cuda else set()
    mine = torch.cat([seed.new_tensor([digest]), seed])
    if digest in known and "drawn" not in call:
        return None, seed
    gathered = all_gather_start(mine, axis).wait().view(axis.size, 2)
    first_seed = gathered[0, 1:].clone()
    if digest in known or bool((gathered[:, 0] == digest).all()):
        known.add(digest)
        return None, first_seed
    return _difference(axis, call, seed.device), first_seed


def agreement_bytes(size: int) -> int:
    """Bytes that each rank sends for a call whose ranks agree."""
    return 16 * (size - 1)


def _difference(axis: Axis, call: dict[str, object], device: torch.device) -> str:
    """A sentence about the first field whose value is not the same everywhere."""
    text = "\0".join(f"{name}\1{_short(value)}" for name, value in call.items())
    padded = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\2")
    mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
    everyone = all_gather_start(mine, axis).wait().view(axis.size, -1).cpu()
    calls = []
    for row in everyone:
        fields = bytes(row.tolist()).rstrip(b"\2").decode(errors="replace").split("\0")
        calls.append(dict(field.split("\1", 1) for field in fields if "\1" in field))
    for rank, other in enumerate(calls):
        if "refused" in other:
            return f"rank {rank} of axis {axis.name!r} refuses its part of the call: {other['refused']}"
    for name, value in calls[0].items():
        for rank, other in enumerate(calls):
            if other.get(name) != value:
                return (
                    f"{name} must be the same on every rank of axis {axis.name!r}, but rank 0 has {value} and rank "
                    f"{rank} has {other.get(name)}; pass the same on all"
                )
    return f"the ranks of axis {axis.name!r} make different calls"


def _short(value: object) -> str:
    text = str(value)
    return (
        text
        if len(text) <= _SHOWN
        else f"{text[:_SHOWN]}... ({hashlib.blake2b(text.encode()).hexdigest()[:8]})"
    )
