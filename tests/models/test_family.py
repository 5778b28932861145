"""A second family of models: a section, a class, and one line; a run, its checkpoint and the page of keys have it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from torch import nn

from pypar.blocks import Block, global_parameters
from pypar.mesh import Mesh, parse_mesh
from pypar.models.families import FAMILIES
from pypar.models.family import ModelSection
from pypar.models.initial_weights import initial_weight
from pypar.models.layers import Linear
from pypar.settings import check_values, setting
from pypar.sharded import Sharded
from pypar.tensor_parallel.config import check_cut
from pypar.train.config import RunConfig, load_config
from pypar.train.generate import load_model
from pypar.train.keys import page
from pypar.train.preflight import check
from pypar.train.trainer import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MixerSizes:
    filled_in = ("vocab_size",)
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int = field(default=2, init=False)

    @property
    def num_parameters(self):
        return 2 * self.vocab_size * self.width + self.num_layers * 2 * self.width**2

    @property
    def outer_shapes(self):
        return {"embed.weight": (self.vocab_size, self.width)}

    def flops_per_token(self, length):
        return 6 * self.num_parameters


class Layer(nn.Module):
    def __init__(self, width, dtype):
        super().__init__()
        self.up, self.down = Linear(width, width, dtype), Linear(width, width, dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Mixer(nn.Module):
    """The next token by the last one alone."""

    parallel_plan = {"embed": "vocab", "*.up": "column", "*.down": "row", "head": "column"}

    def __init__(self, sizes, *, seed, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(sizes.vocab_size, sizes.width, dtype=dtype)
        self.layers = nn.ModuleDict({str(i): Layer(sizes.width, dtype) for i in range(sizes.num_layers)})
        self.head = Linear(sizes.width, sizes.vocab_size, dtype)

    def initial_weight(self, seed):
        return lambda name, shape: initial_weight(name, shape, seed, 0.05)

    def blocks(self):
        layers = [Block(f"layers.{i}", (f"layers.{i}",)) for i in self.layers]
        return [Block("embed", ("embed",)), *layers, Block("head", ("head",))]

    def forward(self, x, *, cache=None, sequences=None):
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(x)


@dataclass(frozen=True)
class MixerSection(ModelSection):
    """Sizes of the mixer."""

    vocab_size: int = setting(0, at_least=0, help="0: the tokenizer's")
    num_layers: int = setting(2, at_least=1, help="layers")
    width: int = setting(16, at_least=2, help="width")

    def check(self, run):
        check_cut("model", {"width": self.width, "vocab_size": self.vocab_size}, run)
        return ()

    def filled(self, vocab_size):
        return replace(self, vocab_size=self.vocab_size or vocab_size)

    def sizes(self, vocab_size):
        filled = self.filled(vocab_size)
        return MixerSizes(**{f.name: getattr(filled, f.name) for f in fields(MixerSizes) if f.init})

    def model_class(self):
        return Mixer


@pytest.fixture
def mixer(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mixer", MixerSection)


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(400)))
    return {
        "directory": str(tmp_path / "runs"),
        "data": {"path": str(text), "cache_directory": str(tmp_path / "cache")},
        "model": {"family": "mixer", "width": 12},
        "train": {"steps": 3, "batch_size": 4, "microbatch_size": 1, "sequence_length": 16},
    }


def test_keys_are_those_of_the_family(mixer) -> None:
    config = load_config(None, ["model.width=8", "model.family=mixer"])
    assert config.model == MixerSection("mixer", width=8)
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown configuration key 'model.d_ff'"):
        load_config(None, ["model.family=mixer", "model.d_ff=8"])
    with pytest.raises(ValueError, match=r"model.width \(1\) must be at least 2"):
        check_values(load_config(None, ["model.family=mixer", "model.width=1"]))
    with pytest.raises(
        ValueError, match="model.family 'mixr' is not one of decoder, mixer; did you mean 'mixer'"
    ):
        load_config(None, ["model.family=mixr"])
    with pytest.raises(ValueError, match=r"configuration key 'model.family' must be text, not \['mixer'\]"):
        load_config(None, ["model.family=['mixer']"])
    assert '## `[model]` with `family = "mixer"`\n\nSizes of the mixer.\n' in page()
    assert "| `width` | `16` | a whole number at least 2 | width |" in page()


def run(config, save=False):
    """In each rank: losses, whole weights, and the last checkpoint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(FAMILIES, "mixer", MixerSection)
        ready = RunConfig.from_dict(config)
        trainer = Trainer(ready, Mesh.of(parse_mesh(ready.mesh)), CPU)
        losses = [trainer.train_step()["loss"] for _ in range(3)]
        weights = {
            name: (p.full_tensor() if isinstance(p, Sharded) else p).detach().clone()
            for name, p in global_parameters(trainer.model)
        }
        return losses, weights, trainer.save() if save else None


def test_a_run_of_another_family(ranks, mixer, config) -> None:
    for mesh, sentence in (("tp=5", "model.width (12) must divide by the tp size (5)"), ("tp=2", "")):
        if sentence:
            with pytest.raises(ValueError) as refused:
                check(RunConfig.from_dict(config | {"mesh": mesh}))
            assert sentence in str(refused.value)
        else:
            assert check(RunConfig.from_dict(config | {"mesh": mesh})).num_ranks == 2
    losses, weights, saved = run(config, save=True)
    for mesh in ("tp=2", "pp=2"):
        for others, parts, _ in ranks(2, run, config | {"mesh": mesh}):
            assert others == pytest.approx(losses, rel=1e-5)
            for name, part in parts.items():
                torch.testing.assert_close(part, weights[name], rtol=1e-4, atol=1e-6)
    model, _ = load_model(saved)
    assert isinstance(model, Mixer) and torch.equal(model.head.weight, weights["head.weight"])


class TwinSection(MixerSection):
    """Another family whose weights have the mixer's names and shapes."""


def test_a_checkpoint_of_another_family_is_refused_though_its_weights_fit(mixer, config, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "twin", TwinSection)
    _, _, saved = run(config, save=True)
    again = config | {"train": config["train"] | {"steps": 5, "resume": str(saved)}}
    assert check(RunConfig.from_dict(again)).config.train.resume == str(saved)
    twin = RunConfig.from_dict(again | {"model": config["model"] | {"family": "twin"}})
    with pytest.raises(
        ValueError,
        match="holds a model of family 'mixer' but the configuration says 'twin'; set model.family or",
    ):
        check(twin)
