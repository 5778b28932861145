"""Rotary position embeddings of transformers' attention by `pypar.rope`.

The attention of every family calls one function of its file, `apply_rotary_pos_emb(q, k, cos, sin)`. Patching that
would reach every model in the process. Here an attention module gets a class whose `forward` is the same code with
another name in that place, under which pypar's function stands beside transformers' in the globals of that file. (A
forward with a copy of these globals would do, but torch.compile looks names up in the module itself.)
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pypar.hugging_face.fused.recognition import (
    Swap,
    Verdict,
    covered,
    device_of,
    difference,
    global_names,
    is_same,
    known,
    numbers,
)
from pypar.ops.rope import rope

_PREFIX = "pypar_"
_TURNS = ("llama", "olmo2", "phi3", "gpt_oss")  # whose apply_rotary_pos_emb is known
_TABLES = ("llama.Llama", "olmo2.Olmo2", "gemma3.Gemma3", "gpt_oss.GptOss")  # whose RotaryEmbedding is known


def rotary_verdict(module: nn.Module, tables: Callable[[], Sequence[nn.Module]]) -> Verdict | None:
    """None where the module's forward calls no function that turns q and k as pypar can.

    tables: gives the modules that give cos and sin, as `tables_for` finds them.
    """
    forward = type(module).forward
    name = _turning_name(forward)
    if name is None:
        return None
    return Verdict(_SWAP, _reason(module, tables(), name))


def _reason(module: nn.Module, tables: Sequence[nn.Module], name: str) -> str:
    forward: Any = type(module).forward
    if any(each.argval == name and each.opname != "LOAD_GLOBAL" for each in dis.get_instructions(forward)):
        return f"its forward uses the name {name} for something else too"
    strange = [type(each).__name__ for each in tables if not _is_known_table(each)]
    if strange:
        return f"cos and sin come from {strange[0]}, which may turn the halves of a head by different angles"
    if not tables:
        return "the model has no module that makes cos and sin, so that pypar cannot know what they are"
    return covered(module) or _difference(forward.__globals__[name], device_of(module))


def tables_for(name: str, model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of the smallest part of a model that holds the module of this name and has any.

    All such modules say so in the names of their classes, those that pypar knows and others.
    """
    rotaries = {at: each for at, each in model.named_modules() if "Rotary" in type(each).__name__}
    while name:
        name = name.rpartition(".")[0]
        found = [each for at, each in rotaries.items() if not name or at.startswith(f"{name}.")]
        if found:
            return found
    return []


def _turning_name(forward: Any) -> str | None:
    """Under which global name a forward finds a function that is known to turn q and k."""
    if not isinstance(forward, FunctionType):
        return None
    for name in global_names(forward.__code__):
        value = forward.__globals__.get(name)
        if isinstance(value, FunctionType) and _model_with(value) is not None:
            return name
    return None


def _model_with(function: FunctionType) -> str | None:
    """The model of transformers whose apply_rotary_pos_emb a function is."""
    known_turns = ((model, known(f"{model}.apply_rotary_pos_emb")) for model in _TURNS)
    return next((model for model, turn in known_turns if turn is not None and is_same(function, turn)), None)


def _is_known_table(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    tables = (known(f"{name}RotaryEmbedding.forward") for name in _TABLES)
    return any(is_same(forward, inspect.unwrap(table)) for table in tables if table is not None)


def _with_rope(original: Any) -> Mapping[str, Any]:
    forward = original.forward
    name = _turning_name(forward)
    assert name is not None, "rotary_verdict has found it"
    turn = forward.__globals__[name]
    forward.__globals__.setdefault(_PREFIX + name, _fused_turn(_model_with(turn)))
    code = forward.__code__
    renamed = tuple(_PREFIX + each if each == name else each for each in code.co_names)
    new: Any = FunctionType(
        code.replace(co_names=renamed), forward.__globals__, forward.__name__, forward.__defaults__
    )
    functools.update_wrapper(new, forward)
    new.__kwdefaults__ = forward.__kwdefaults__
    del new.__wrapped__  # it is no wrapper
    return {"forward": new}


@functools.cache
def _fused_turn(model: str | None) -> Callable[..., tuple[Tensor, Tensor]]:
    keeps_dtype = model == "olmo2"  # the others give what torch promotes x and the tables to
    has_halves = model == "gpt_oss"  # [..., H/2]; the others [..., H], with two equal halves

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q, k: [B, N, T, H], or with unsqueeze_dim 2 [B, T, N, H]; cos, sin: [B or 1, T, ...]."""
        if not keeps_dtype:
            q, k = (x.to(torch.promote_types(x.dtype, cos.dtype)) for x in (q, k))
        if not has_halves:
            cos, sin = (table[..., : table.shape[-1] // 2] for table in (cos, sin))
        table_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        cos, sin = cos.to(table_dtype), sin.to(table_dtype)
        if unsqueeze_dim == 2:
            return rope(q, cos, sin, k)
        q, k = rope(q.transpose(1, 2), cos, sin, k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


@functools.cache  # a model has as many attentions as layers
def _difference(turn: FunctionType, device: torch.device) -> str:
    """How the known function and pypar's differ: for tables of one and of two sequences, and for parts of heads where
    the known one takes these."""
    model = _model_with(turn)
    fused = _fused_turn(model)
    for sequences, width in ((1, 8), (2, 8), (1, 4)) if model == "phi3" else ((1, 8), (2, 8)):
        angles = numbers(sequences, 3, width // 2, seed=1, device=device)
        angles = angles if model == "gpt_oss" else torch.cat((angles, angles), dim=-1)
        q, k = numbers(2, 4, 3, 8, seed=2, device=device), numbers(2, 2, 3, 8, seed=3, device=device)
        tables = angles.cos(), angles.sin()
        reason = difference(lambda q, k: turn(q, k, *tables), lambda q, k: fused(q, k, *tables), q, k)  # noqa: B023
        if reason:
            return reason
    return ""


_SWAP = Swap("rotary embedding", "pypar.rope", _with_rope)
