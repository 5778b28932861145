"""`memory.offload` of a run: the losses of states in memory, and checkpoints either way."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from pypar.mesh import Mesh, parse_mesh
from pypar.train.config import load_config
from pypar.train.preflight import check
from pypar.train.trainer import Trainer
from tests.harness.small_run import assignments, small_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    (folder / "text.txt").write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(600)))
    return folder


def _config(place, **changes):
    return load_config(None, assignments(small_run(place, train__steps=5, **changes)))


def _losses(place, mesh, changes, saves, resumes):
    trainer = Trainer(
        _config(place, mesh=f'"{mesh}"', **changes), Mesh.of(parse_mesh(mesh)), torch.device("cpu")
    )
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    trainer.save(place / saves)
    losses.append(trainer.train_step()["loss"])
    if resumes:
        trainer.load(place / resumes / "step_00000002")
        losses.append(trainer.train_step()["loss"])
    return losses


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_losses_and_checkpoints_are_those_of_states_in_memory(ranks, place, tmp_path, zero):
    changes = {"memory__zero": zero, "train__precision": "bf16" if zero == 1 else "fp32"}
    disk = {
        "memory__offload": "nvme",
        "memory__offload_directory": tmp_path,
        "memory__offload_part_bytes": 20_000,
    }
    plain = ranks(2, _losses, place, "dp=2", changes, "plain", "")
    on_disk = ranks(2, _losses, place, "dp=2", changes | disk, "disk", "plain")
    assert [each[:3] for each in on_disk] == plain
    assert [each[3] for each in on_disk] == [each[2] for each in plain]
    back = ranks(2, _losses, place, "dp=2", changes, "plain", "disk")
    assert [each[3] for each in back] == [each[2] for each in plain]


@pytest.mark.parametrize(
    ("mesh", "zero", "precision"),
    [("dp=2", 0, "fp32"), ("dp=2", 3, "bf16"), ("tp=2", 3, "fp32"), ("pp=2", 2, "fp32"), ("dp=2", 1, "fp16")],
)
def test_chunks_have_the_losses_and_checkpoints_of_states_on_the_device(ranks, place, mesh, zero, precision):
    changes = {"memory__zero": zero, "train__precision": precision, "train__batch_size": 4}
    chunks = {"memory__offload": "chunks", "memory__device_bytes": '"2MB"', "train__bucket_bytes": 20_000}
    plain = ranks(2, _losses, place, mesh, changes, "plain", "")
    chunked = ranks(2, _losses, place, mesh, changes | chunks, "chunks", "plain")
    assert [each[:3] for each in chunked] == plain
    assert [each[3] for each in chunked] == [each[2] for each in plain]
    back = ranks(2, _losses, place, mesh, changes, "plain", "chunks")
    assert [each[3] for each in back] == [each[2] for each in plain]


def _fitted(place):
    config = _config(
        place,
        mesh='"dp=2"',
        memory__zero=3,
        memory__offload="chunks",
        memory__device_bytes='"2MB"',
        train__bucket_bytes=20_000,
    )
    trainer = Trainer(config, Mesh.of(parse_mesh("dp=2")), torch.device("cpu"))
    with contextlib.redirect_stderr(io.StringIO()) as told:
        trainer.fit()
    return trainer.store.places.num_plans, trainer.store.places.device.peak, told.getvalue()


def test_a_run_says_where_its_chunks_lie(ranks, place):
    results = ranks(2, _fitted, place)
    for num_plans, peak, _ in results:
        assert num_plans == 1 and peak <= 2_000_000
    assert results[0][2].count("device budget 2,000,000 bytes, of which a step takes at most") == 1
    assert "stay on the device with their optimizer states" in results[0][2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory__offload": "chunks"}, "memory.device_bytes .* set both, or neither"),
        ({"memory__device_bytes": '"5MB"'}, "memory.device_bytes .* set both, or neither"),
        ({"memory__offload": "nvme"}, "needs memory.offload_directory, a folder of a local disk"),
        ({"memory__offload": "nvme", "memory__offload_directory": "/no/folder"}, "/no/folder.* is not there"),
        ({"memory__offload_directory": "/tmp"}, "is for memory.offload='nvme', and it is 'none'"),
        ({"memory__offload": "disk"}, "memory.offload"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_starts(place, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(_config(place, **changes), 1)
