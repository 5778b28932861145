"""Documents packed into one sequence do not see each other, and the end of one does not predict the next."""

import json
from pathlib import Path

import torch

from pypar.mesh import Mesh
from pypar.models import Decoder, DecoderConfig, Sequences
from pypar.train.config import DataConfig
from pypar.train.data import IGNORED, open_data

SIZES = DecoderConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_size=4, d_ff=24
)


def test_each_document_has_the_logits_that_it_has_alone() -> None:
    model = Decoder(SIZES, Mesh(), dtype=torch.float64)
    tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(0))
    documents = [[0, 4, 5, 13], [0, 0, 9, 13]]
    ends = tuple(torch.tensor(row, dtype=torch.int32) for row in documents)
    with torch.no_grad():
        packed = model(tokens, sequences=Sequences(13, ends))
        for row, bounds in enumerate(documents):
            for start, end in zip(bounds, bounds[1:], strict=False):
                alone = model(tokens[row : row + 1, start:end])
                torch.testing.assert_close(packed[row, start:end], alone[0], rtol=1e-10, atol=1e-10)


def _data(folder: Path, packed: bool):
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps({"text": "ab" * (1 + n % 3)}) + "\n" for n in range(40)))
    config = DataConfig(path=str(file), cache_directory=str(folder / "cache"), validation_fraction=0.2)
    return open_data(config, 12, 0, packed)


def test_documents_end_with_the_end_token(tmp_path: Path) -> None:
    data = _data(tmp_path, True)
    tokens, targets = data.train_batch(0, 4)
    documents = data.documents(tokens)
    assert documents is not None
    for row, ends in zip(tokens, documents, strict=True):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == 12
        inner = ends[1:-1]
        assert (row[inner - 1] == 0).all() and int((row[:-1] == 0).sum()) == len(inner) > 0
    plain_tokens, plain = _data(tmp_path, False).train_batch(0, 4)
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(targets, plain.masked_fill(tokens == 0, IGNORED))


def test_without_packing_a_sequence_is_one_document(tmp_path: Path) -> None:
    data = _data(tmp_path, False)
    assert data.documents(data.train_batch(0, 2)[0]) is None
