"""save_pretrained of a transformers model that is cut: whole files, gathered and written one tensor at a time.

The mesh's first rank writes; the others of the axis over which the model is cut send it their parts. None holds more
than one whole tensor, except where transformers stores weights in another form than it computes with (experts,
adapters): then the first rank gathers the whole model in its host's memory and hands it to transformers.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pypar.axis import Axis
from pypar.comm import all_reduce_start
from pypar.files.tensors import Entry, TensorFile, dtype_name
from pypar.sharded import Sharded

_POLL_S = 0.02
_KNOWN = {"max_shard_size", "variant", "save_original_format", "save_peft_format", "token"}
_REFUSED = ("push_to_hub", "distributed_checkpoint")


def write_whole_files(model: nn.Module, axis: Axis, world: Axis) -> None:
    """Let save_pretrained of the transformers models in ``model`` write whole files; resizing is refused.

    axis: over which the model is cut. world: the ranks that call it.
    """
    model_class = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    for part in model.modules():
        if model_class is not None and isinstance(part, model_class):
            part.save_pretrained = SavePretrained(part, axis, world)  # type: ignore[assignment]
            part.resize_token_embeddings = _refuse_resize  # type: ignore[assignment]


def _refuse_resize(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "resize_token_embeddings of a cut model would resize one rank's part; resize the model before "
        "pypar.parallelize"
    )


@dataclass(eq=False)
class SavePretrained:
    """A model's save_pretrained, which every rank of the mesh calls.

    It takes what transformers' own takes. RuntimeError: on the ranks that called it, where others did not within
    ``wait_s`` seconds; on all, where the rank that writes failed. ValueError: push_to_hub, distributed_checkpoint.
    """

    model: Any
    axis: Axis
    world: Axis
    wait_s: float = 60.0

    @torch.no_grad()
    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        for option in _REFUSED:
            if options.pop(option, False):
                raise ValueError(
                    f"save_pretrained of a cut model has no {option}; save to a folder, and upload that"
                )
        self._wait_for_all()
        given = self.model.state_dict(keep_vars=True) if state_dict is None else state_dict
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        tensors = {name: x for name, x in _each_once(given).items() if name not in ignored}
        problem: Exception | None = None
        if self.world.ranks[0] in self.axis.ranks:
            problem = self._gather_and_write(tensors, Path(save_directory), options)
        device = next(self.model.parameters()).device
        failed = torch.tensor(problem is not None, dtype=torch.uint8, device=device)
        if self.world.size > 1:
            failed = all_reduce_start(failed, self.world, dist.ReduceOp.MAX).wait()
        if problem is not None:
            raise problem
        if failed.item():
            raise RuntimeError(
                f"save_pretrained to {save_directory} failed on rank {self.world.ranks[0]}, which writes; see its error"
            )

    def _wait_for_all(self) -> None:
        """The ranks count their calls in the job's store, so that one that calls alone is told so and does not hang."""
        if self.world.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        keys = {rank: f"pypar/save_pretrained/{self.world.ranks}/{rank}" for rank in self.world.ranks}
        own = keys[self.world.ranks[self.world.rank]]
        calls = store.add(own, 1)
        end = time.monotonic() + self.wait_s
        missing = list(keys)
        while missing := [rank for rank in missing if store.add(keys[rank], 0) < calls]:
            if time.monotonic() > end:
                store.add(own, -1)
                raise RuntimeError(
                    f"save_pretrained of a cut model was called on this rank, but ranks {missing} did "
                    f"not call it within {self.wait_s:g} s; call it on every rank, not under `if rank == 0`"
                )
            time.sleep(_POLL_S)

    def _gather_and_write(
        self, tensors: dict[str, Tensor], folder: Path, options: dict[str, Any]
    ) -> Exception | None:
        """Every rank gathers every tensor; the first one writes it, and after an error only gathers."""
        writes = self.world.rank == 0
        sink: _Files | _Held | None = None
        problem: Exception | None = None
        if writes:
            try:
                sink = _Files.of(self.model, tensors, folder, options) or _Held(self.model, folder, options)
            except Exception as error:  # told to all ranks below
                problem = error
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, (Sharded, DTensor)) else tensor.detach()
            if sink is not None and problem is None:
                try:
                    sink.write(name, whole)
                except Exception as error:
                    problem = error
        if sink is not None and problem is None:
            try:
                sink.finish()
            except Exception as error:
                problem = error
        return problem


def _each_once(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Without further names of a tensor that is tied: transformers ties them again."""
    first: dict[int, str] = {}
    return {name: x for name, x in state_dict.items() if first.setdefault(id(x), name) == name}


class _Held:
    """Keeps all whole tensors, for transformers to convert and write them."""

    def __init__(self, model: Any, folder: Path, options: dict[str, Any]) -> None:
        self._model, self._folder, self._options = model, folder, options
        self._tensors: dict[str, Tensor] = {}

    def write(self, name: str, whole: Tensor) -> None:
        self._tensors[name] = whole.cpu()

    def finish(self) -> None:
        write = type(self._model).save_pretrained
        write(self._model, self._folder, state_dict=self._tensors, **self._options)


class _Files:
    """Configuration, weights in files of at most max_shard_size, and their index, in a folder."""

    def __init__(
        self, model: Any, folder: Path, tensors: dict[str, Tensor], names: dict[str, str], options: Any
    ):
        from huggingface_hub import split_torch_state_dict_into_shards

        self._folder, self._names = folder, names
        variant = f".{options['variant']}" if options.get("variant") else ""
        self._stem, self._index = f"model{variant}", folder / f"model.safetensors.index{variant}.json"
        default = inspect.signature(type(model).save_pretrained).parameters["max_shard_size"].default
        folder.mkdir(parents=True, exist_ok=True)
        _write_configuration(model, folder)
        described = {names[name]: _on_meta(x) for name, x in tensors.items()}
        self._split = split_torch_state_dict_into_shards(
            described,
            filename_pattern=self._stem + "{suffix}.safetensors",
            max_shard_size=options.get("max_shard_size", default),
        )
        self._files = {
            file: TensorFile(folder / file, _entries({name: described[name] for name in members}))
            for file, members in self._split.filename_to_tensors.items()
        }
        self._num_parameters = sum(x.numel() for x in described.values())

    @classmethod
    def of(
        cls, model: Any, tensors: dict[str, Tensor], folder: Path, options: dict[str, Any]
    ) -> _Files | None:
        """None where transformers would store something else than these tensors under these or other names."""
        is_plain = not getattr(model, "_hf_peft_config_loaded", False) and not model.is_remote_code()
        if not is_plain or set(options) - _KNOWN or not all(map(_can_hold, tensors.values())):
            return None
        stored = {name: _on_meta(x) for name, x in tensors.items()}
        names = {id(x): name for name, x in stored.items()}
        if options.get("save_original_format", True):
            from transformers.core_model_loading import revert_weight_conversion

            stored = revert_weight_conversion(model, stored)
        if len(stored) != len(names) or any(id(x) not in names for x in stored.values()):
            return None
        return cls(model, folder, tensors, {names[id(x)]: name for name, x in stored.items()}, options)

    def write(self, name: str, whole: Tensor) -> None:
        stored = self._names[name]
        flat = whole.cpu().contiguous().reshape(-1)
        self._files[self._split.tensor_to_filename[stored]].write(stored, flat.view(torch.uint8).numpy())

    def finish(self) -> None:
        """Put the files in the places of those of an earlier save, of whatever number."""
        pattern = re.compile(re.escape(self._stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
        for file in self._files.values():
            file.finish()
        for old in [*self._folder.iterdir()]:
            if old == self._index or (pattern.fullmatch(old.name) and old.name not in self._files):
                old.unlink()
        if self._split.is_sharded:
            metadata = {"total_parameters": self._num_parameters, **self._split.metadata}
            content = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            self._index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _can_hold(x: object) -> bool:
    return isinstance(x, Tensor) and dtype_name(x.dtype) is not None


def _entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    """In the order of a file."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    return {name: Entry(str(dtype_name(x.dtype)), tuple(x.shape)) for name, x in ordered}


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _write_configuration(model: Any, folder: Path) -> None:
    """Write the configuration as transformers does."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
