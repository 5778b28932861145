"""Bad input of tensor-parallel layers: a sentence with the value, the rule and the remedy, on every rank."""

import pytest
import torch

from pypar.mesh import Mesh
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    vocab_parallel_cross_entropy,
)


def run_refused(call):
    axis = Mesh(tp=2).tp
    calls = {
        "out_features": lambda: ColumnParallelLinear(4, 7, axis),
        "in_features": lambda: RowParallelLinear(1, 4, axis),
        "vocabulary": lambda: VocabParallelEmbedding(257, 4, axis),
        "id": lambda: VocabParallelEmbedding(8, 4, axis)(torch.tensor([[3, 8]])),
        "padding": lambda: VocabParallelEmbedding(8, 4, axis, padding_idx=8),
        "biases": lambda: column_parallel(torch.ones(2, 4), [torch.ones(3, 4)], axis, biases=[]),
        "column": lambda: ColumnParallelLinear(4, 8, axis, sequence_parallel=True)(torch.ones(2, 4)),
        "row": lambda: RowParallelLinear(8, 4, axis, sequence_parallel=True)(torch.ones(2, 4)),
        "ids": lambda: VocabParallelEmbedding(8, 4, axis, sequence_parallel=True)(torch.tensor([1])),
        "length": lambda: RowParallelLinear(8, 4, axis, sequence_parallel=True)(torch.ones(1, 3, 4)),
        "target": lambda: vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([8]), axis),
        "targets": lambda: vocab_parallel_cross_entropy(torch.ones(2, 4), torch.tensor([1]), axis),
        "target_type": lambda: vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([1.0]), axis),
    }
    with pytest.raises(ValueError) as caught:
        calls[call]()
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("out_features", "out_features (7) must divide by the tp size (2); use 6 or 8"),
        ("in_features", "in_features (1) must divide by the tp size (2); use 2"),
        ("vocabulary", "(257) must divide by the tp size (2); use 256 or 258"),
        ("id", "token id 8 is outside of the vocabulary [0, 8)"),
        ("padding", "padding_idx (8) must be a token id from 0 to 7"),
        ("biases", "0 biases for 1 weights"),
        ("column", "its input has shape (2, 4); pass x.unsqueeze(0)"),
        ("row", "its input has shape (2, 4); pass x.unsqueeze(0)"),
        ("ids", "they have shape (1,)"),
        ("length", "dim 1 (3)"),
        ("target", "targets contains 8, outside of [0, 8)"),
        ("targets", "reshape targets to (2,)"),
        ("target_type", "convert with targets.long()"),
    ],
)
def test_bad_input_gets_a_sentence(ranks, call, sentence):
    for message in ranks(2, run_refused, call):
        assert sentence in message
