"""`memory.zero` of a run: the losses of zero=0 on every mesh, and checkpoints that any other stage resumes."""

from pathlib import Path

import pytest
import torch

from pypar.mesh import Mesh, parse_mesh
from pypar.train.config import load_config
from pypar.train.preflight import check
from pypar.train.stage import check_whole_backwards
from pypar.train.trainer import Trainer
from tests.harness.small_run import assignments, small_run
from tests.pipeline_parallel.stage import random_schedule


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    (folder / "text.txt").write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(600)))
    return folder


def _config(place, **changes):
    return load_config(None, assignments(small_run(place, train__steps=5, **changes)))


def _losses(place, mesh, changes, resumes="", saves=""):
    """Two steps, the first of which clips, an evaluation and one step more; from and into checkpoints."""
    config = _config(place, mesh=f'"{mesh}"', **changes)
    trainer = Trainer(config, Mesh.of(parse_mesh(mesh)), torch.device("cpu"))
    if resumes:
        trainer.load(place / resumes / f"step_{2:08d}")
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    if saves:
        trainer.save(place / saves)
    return [*losses, trainer.evaluate(1), trainer.train_step()["loss"]]


MESHES = [
    ("dp=2", {}),
    ("cp=2", {"memory__reshard": "false", "train__precision": "bf16"}),
    ("dp=2,tp=2", {"train__sequence_parallel": "true"}),
    ("dp=2,pp=2", {"model__tied_embeddings": "true"}),
    pytest.param("pp=2", {"pipeline__schedule": "gpipe"}, marks=pytest.mark.slow),
    pytest.param("tp=2", {"model__tied_embeddings": "true"}, marks=pytest.mark.slow),
    pytest.param("dp=8", {"train__batch_size": 8}, marks=pytest.mark.slow),
    pytest.param("dp=4,cp=2", {"memory__shard_size": 2}, marks=pytest.mark.slow),
    pytest.param("dp=2,pp=2,tp=2", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "changes"), MESHES, ids=str)
def test_losses_and_checkpoints_are_those_of_zero_0(ranks, place, mesh, changes):
    size = parse_mesh(mesh).grid.num_ranks
    plain = {key: value for key, value in changes.items() if not key.startswith("memory")}
    first = ranks(size, _losses, place, mesh, plain, "", "plain")
    later = ranks(size, _losses, place, mesh, plain, "plain")
    cut = changes | {"memory__zero": 3}
    # gloo adds up four ranks' gradients of a tied embedding in another order than two by two.
    same = pytest.approx if "model__tied_embeddings" in changes and size == 4 else list
    assert ranks(size, _losses, place, mesh, cut, "", "cut") == [same(each) for each in first]
    assert ranks(size, _losses, place, mesh, cut, "plain") == [same(each) for each in later]
    stage = {"memory__zero": 1 + (size == 2)}
    assert ranks(size, _losses, place, mesh, plain | stage, "cut") == [same(each) for each in later]


def test_backwards_in_two_parts_are_refused_where_parameters_come_and_go(place):
    schedule = random_schedule([0, 1], 2, seed=0, splits=True)
    check_whole_backwards(schedule, _config(place, memory__zero=2))
    with pytest.raises(ValueError, match="memory.zero=3 has its parameters only then; use memory.zero=2"):
        check_whole_backwards(schedule, _config(place, memory__zero=3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory__zero": 4}, "memory.zero (4) must be at least 0 and at most 3"),
        ({"memory__zero": 3, "memory__reshard": 0}, "memory.reshard (0) must be at least 1"),
        (
            {"memory__zero": 3, "memory__reshard": '"yes"'},
            "must be true or false, or a whole number, not 'yes'",
        ),
        ({"memory__zero": 2, "memory__reshard": "false"}, "memory.reshard is for memory.zero of at least 3"),
        ({"memory__zero": 3, "memory__reshard": 3}, "memory.reshard (3) must divide the ranks of dp"),
        ({"memory__zero": 2, "memory__shard_size": 3}, "memory.shard_size (3) must divide dp (2)"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_starts(place, changes, sentence):
    with pytest.raises(ValueError) as refused:
        check(_config(place, mesh='"dp=2"', **changes), overwrite=True)
    assert sentence in str(refused.value)
