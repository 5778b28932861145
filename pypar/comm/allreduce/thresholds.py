"""Up to which size which way of all-reduce is taken: shipped values, and those that `pypar bench allreduce --tune`
measured on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from pypar.json_file import read_json
from pypar.paths import cache_folder


class Thresholds(NamedTuple):
    """One-shot up to the first number of bytes, two-shot up to the second, the group's own all-reduce beyond."""

    one_shot_max_bytes: int
    two_shot_max_bytes: int
    source: str

    def method(self, num_bytes: int) -> str:
        if num_bytes <= self.one_shot_max_bytes:
            return "one-shot"
        return "two-shot" if num_bytes <= self.two_shot_max_bytes else "group"


_KIB, _MIB = 1 << 10, 1 << 20
MOST_BYTES = _MIB  # of the file
SEEDS = "seed values from other people's measurements; `pypar bench allreduce --tune` measures this machine's"
# By class of device, then by number of ranks up to which. Seeds: the sizes up to which vLLM takes its own all-reduce
# on sm_90 and sm_100 and its rule for one-shot; torch's IntraNodeComm for sm_80; A800 over PCIe for other devices.
# Nothing here was measured with these kernels.
SHIPPED = {
    "sm_80": {8: (256 * _KIB, 10 * _MIB)},
    "sm_90": {
        2: (64 * _MIB, 64 * _MIB),
        4: (512 * _KIB, 32 * _MIB),
        6: (256 * _KIB, 512 * _KIB),
        8: (256 * _KIB, 256 * _KIB),
    },
    "sm_100": {4: (512 * _KIB, 2 * _MIB), 8: (256 * _KIB, _MIB)},
    "other": {8: (32 * _KIB, 256 * _KIB)},
}


def architecture(device: torch.device) -> str:
    """The class of a device in SHIPPED."""
    if device.type != "cuda":
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(
        (major, minor), "other"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def shipped(arch: str, num_ranks: int) -> Thresholds:
    """The values for the next larger number of ranks in the table."""
    table = SHIPPED[arch]
    return Thresholds(*table[min(n for n in table if n >= num_ranks)], SEEDS)


def cache_file() -> Path:
    """Where measured thresholds are kept."""
    return cache_folder() / "allreduce.json"


def tuned(path: Path, name: str, engine: str, num_ranks: int) -> Thresholds | None:
    """What was measured for this device, engine and number of ranks, or None.

    ValueError: the file is damaged; it says which one and that it may be deleted.
    """
    entry = _read(path).get(name, {}).get(engine, {}).get(str(num_ranks))
    if entry is None:
        return None
    try:
        one_shot, two_shot = int(entry["one_shot_max_bytes"]), int(entry["two_shot_max_bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return Thresholds(one_shot, two_shot, f"measured, {path}")


def store(path: Path, name: str, engine: str, num_ranks: int, thresholds: Thresholds) -> None:
    """Adds to the file; it is replaced as a whole, so that nobody reads half of it."""
    try:
        table = _read(path)
    except ValueError:
        table = {}
    entry = {
        "one_shot_max_bytes": thresholds.one_shot_max_bytes,
        "two_shot_max_bytes": thresholds.two_shot_max_bytes,
    }
    table.setdefault(name, {}).setdefault(engine, {})[str(num_ranks)] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    partial.replace(path)


def choose(device: torch.device, engine: str, num_ranks: int) -> Thresholds:
    """What was measured, else what is shipped; a damaged file is named in `source`."""
    seeds = shipped(architecture(device), num_ranks)
    try:
        return tuned(cache_file(), device_name(device), engine, num_ranks) or seeds
    except ValueError as error:
        return seeds._replace(source=f"{seeds.source}; {error}")


def _read(path: Path) -> dict:
    try:
        table = read_json(path, MOST_BYTES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(table, dict) or not all(
        isinstance(engines, dict) and all(isinstance(ranks, dict) for ranks in engines.values())
        for engines in table.values()
    ):
        raise _damaged(path, "not the tables of devices, engines and ranks")
    return table


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} cannot be read as thresholds ({why}); delete it, or run --tune, which replaces it"
    )
