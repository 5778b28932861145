"""Checkpoints: written by any layout, read by any other, and nothing in them is code.

A checkpoint is a folder ``step_00000100`` with a file of tensors from each rank (`pypar.files.tensors`), an
index of them (`index`) and ``complete.json``, the manifest: step, time of writing, the caller's extra JSON, and the
size of every file. It is written under another name (``.partial``), flushed to disk and renamed by rank 0 when every
rank has finished; a folder without a manifest that agrees with its files is never taken for one. All files of a
checkpoint must be seen by all ranks (one file system). `storage` is the part that torch.distributed.checkpoint
uses, also without the rest.
"""

from pypar.train.checkpoint.manifest import (
    MANIFEST,
    PARTIAL,
    REPLACED,
    check_readable,
    keep_newest,
    latest,
    read_extra,
    read_manifest,
    resolve,
    shown_value,
    survey,
)
from pypar.train.checkpoint.state import State, load, save

__all__ = [
    "MANIFEST",
    "PARTIAL",
    "REPLACED",
    "State",
    "check_readable",
    "keep_newest",
    "latest",
    "load",
    "read_extra",
    "read_manifest",
    "resolve",
    "save",
    "shown_value",
    "survey",
]
