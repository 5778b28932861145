"""A model as a list of blocks: which stage has which, and what stages share."""

import pytest
import torch
from torch import nn

from pypar.blocks import Block, blocks_of, global_parameters, keep_stage, stage_blocks
from pypar.layout import layout_of
from pypar.models import Decoder, DecoderConfig

SIZES = dict(vocab_size=16, d_model=8, num_heads=2, num_kv_heads=1, head_size=4, d_ff=12)


def _decoder(num_layers, tied=False):
    return Decoder(DecoderConfig(**SIZES, num_layers=num_layers, tied_embeddings=tied), seed=1)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (5, 2, [3, 2]),
        (5, 3, [2, 2, 1]),
        (7, 4, [2, 2, 2, 1]),
        (9, 4, [2, 3, 2, 2]),
    ],
)
def test_layers_are_spread_evenly_and_a_remainder_avoids_the_ends(num_layers, num_stages, sizes):
    blocks = blocks_of(_decoder(num_layers))
    stages = [stage_blocks(blocks, num_stages, stage) for stage in range(num_stages)]
    assert [block for stage in stages for block in stage] == blocks
    assert [sum(block.name.startswith("layers.") for block in stage) for stage in stages] == sizes


def test_stages_together_are_the_model():
    x = torch.randint(16, (2, 5), generator=torch.Generator().manual_seed(0))
    whole = _decoder(5)
    held = x
    names = []
    for stage in range(3):
        model = _decoder(5)
        keep_stage(model, 3, stage)
        held = model(held)
        names += [name for name, _ in global_parameters(model)]
    torch.testing.assert_close(held, whole(x), rtol=0, atol=0)
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())


def test_a_shared_parameter_has_one_name_and_is_summed_over_both_stages():
    for stage, local in ((0, "embedding.weight"), (2, "head.weight")):
        model = _decoder(5, tied=True)
        keep_stage(model, 3, stage)
        parameter = dict(model.named_parameters())[local]
        assert dict(global_parameters(model))["embedding.weight"] is parameter
        assert layout_of(parameter).sum_over == ("dp", "cp", "tied")
        assert all("tied" not in layout_of(p).sum_over for p in model.parameters() if p is not parameter)
    whole = _decoder(5, tied=True)
    keep_stage(whole, 1, 0)
    assert all("tied" not in layout_of(p).sum_over for p in whole.parameters())


class Shared(nn.Module):
    """Two layers in between share a weight."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
        self.parts[3].weight = self.parts[2].weight

    def blocks(self):
        return [Block(str(i), (f"parts.{i}",)) for i in range(6)]


def test_what_cannot_be_a_pipeline_is_refused():
    with pytest.raises(ValueError, match="a Linear does not say what its blocks are"):
        blocks_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 layers has too few for 3 pipeline stages.*use pp <= 2"):
        keep_stage(_decoder(2), 3, 0)
    for stage in range(4):  # every stage says so, that none waits for another
        with pytest.raises(ValueError, match="stage 1 of 4 shares parts.2.weight with another one"):
            keep_stage(Shared(), 4, stage)


def test_a_parameter_that_is_in_no_block_is_refused():
    """Each stage would have trained its own by its part of the gradient."""
    model = Shared()
    model.scale = nn.Parameter(torch.ones(2))
    keep_stage(model, 1, 0)
    for stage in range(2):
        with pytest.raises(
            ValueError, match="^no block of this Shared's .* has scale, which each of 2 pipeline stages"
        ):
            keep_stage(model, 2, stage)
    model.scale.requires_grad_(False)
    keep_stage(model, 2, 1)


def test_a_name_outside_blocks_of_a_parameter_inside_is_refused():
    """Stages without its block would have kept, and used, the values of the start."""
    model = Shared()
    model.first = model.parts[0].weight
    keep_stage(model, 1, 0)
    for stage in range(2):
        with pytest.raises(ValueError, match="^first is parts.0.weight under another name, which no block"):
            keep_stage(model, 2, stage)
    model.first.requires_grad_(False)
    keep_stage(model, 2, 1)
