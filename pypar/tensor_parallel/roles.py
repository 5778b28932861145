"""The roles of tensor parallelism: how a linear layer, an embedding or what stands beside them is cut over tp."""

from __future__ import annotations

from typing import Any

from torch import nn

from pypar.role import Match, Role, Spreading
from pypar.sharded.partial import sum_in_backward
from pypar.tensor_parallel.column import ColumnParallelLinear
from pypar.tensor_parallel.config import AXES
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.head import VocabParallelHead
from pypar.tensor_parallel.heads import give_heads
from pypar.tensor_parallel.latent import LatentKeyValueLinear, num_shared_features
from pypar.tensor_parallel.row import RowParallelLinear
from pypar.tensor_parallel.unit import join


def _column(match: Match, spreading: Spreading) -> nn.Module:
    if match.parameter is not None:
        give_heads(match.module, match.parameter, spreading.axis(ROLES[match.role]))
        return match.module
    return _linear(ColumnParallelLinear, match, spreading)


def _column_gather(match: Match, spreading: Spreading) -> nn.Module:
    return _linear(ColumnParallelLinear, match, spreading, gather_output=True)


def _head(match: Match, spreading: Spreading) -> nn.Module:
    return _linear(VocabParallelHead, match, spreading)


def _row(match: Match, spreading: Spreading) -> nn.Module:
    return _linear(RowParallelLinear, match, spreading)


def _row_split(match: Match, spreading: Spreading) -> nn.Module:
    return _linear(RowParallelLinear, match, spreading, split_input=True)


def _linear(
    layer: type[ColumnParallelLinear] | type[RowParallelLinear],
    match: Match,
    spreading: Spreading,
    **options: Any,
) -> nn.Module:
    """The layer on the meta device, so that no value is drawn."""
    old, axis = match.module, spreading.axis(ROLES[match.role])
    assert isinstance(old, nn.Linear)
    return layer(
        old.in_features,
        old.out_features,
        axis,
        bias=old.bias is not None,
        sequence_parallel=spreading.sequence_parallel,
        dtype=old.weight.dtype,
        device="meta",
        **options,
    )


def _vocab(match: Match, spreading: Spreading) -> nn.Module:
    old, axis = match.module, spreading.axis(ROLES[match.role])
    assert isinstance(old, nn.Embedding)
    return VocabParallelEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        axis,
        padding_idx=old.padding_idx,
        sequence_parallel=spreading.sequence_parallel,
        dtype=old.weight.dtype,
        device="meta",
    )


def _latent(match: Match, spreading: Spreading) -> nn.Module:
    assert isinstance(match.module, nn.Linear)
    return LatentKeyValueLinear(
        match.module, _num_shared(match, spreading), spreading.axis(ROLES[match.role])
    )


def _num_shared(match: Match, spreading: Spreading) -> int:
    return num_shared_features(spreading.model, match.name)


def _norm(match: Match, spreading: Spreading) -> nn.Module:
    """Under sequence parallelism a norm sees this rank's positions, and has a part of its gradients."""
    if spreading.sequence_parallel:
        for parameter in match.parameters():
            sum_in_backward(parameter, spreading.axis(ROLES[match.role]))
    return match.module


def _per_head(match: Match, spreading: Spreading) -> nn.Module:
    """What works on each head stays whole; `pypar.parallel` sums its gradients, once it knows that they are parts."""
    return match.module


ROLES = {
    "column": Role(
        nn.Linear, AXES, _column, 0, "out_features", gives_part=True, of_parameters=True, join=join
    ),
    "row": Role(nn.Linear, AXES, _row, 1, "in_features", takes_part=True),
    "head": Role(nn.Linear, AXES, _head, 0, "out_features", gives_part=True),
    "vocab": Role(nn.Embedding, AXES, _vocab, 0, "num_embeddings", is_optional=True),
    "column_gather": Role(nn.Linear, AXES, _column_gather, 0, "out_features", is_optional=True),
    "row_split": Role(nn.Linear, AXES, _row_split, 1, "in_features", is_optional=True),
    "norm": Role(nn.Module, AXES, _norm, sees_positions=True),
    "per_head": Role(nn.Module, AXES, _per_head, of_parameters=True, serves_heads=True),
    "latent_kv": Role(nn.Linear, AXES, _latent, check=_num_shared),
}

# Names that say the same in every model that has them: of OPT, GPT-NeoX, BART and their like.
USUAL_PLAN = {
    "*.q_proj": "column",
    "*.k_proj": "column",
    "*.v_proj": "column",
    "*.sinks": "column",
    "*.query_key_value": "column",
    "*.o_proj": "row",
    "*.out_proj": "row",
    "*.self_attn.dense": "row",
    "*.attention.dense": "row",
    "*.gate_proj": "column",
    "*.up_proj": "column",
    "*.down_proj": "row",
    "*.fc1": "column",
    "*.fc2": "row",
    "*.dense_h_to_4h": "column",
    "*.dense_4h_to_h": "row",
    "*.embed_tokens": "vocab",
    "*.embed_in": "vocab",
    "*.lm_head": "column_gather",
    "*.embed_out": "column_gather",
}
