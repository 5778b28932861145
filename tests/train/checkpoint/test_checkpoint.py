"""Checkpoints: any layout reads what any other wrote, and only what was completely written."""

import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from pypar.layout import Cut, Layout, layout_of, local_part
from pypar.mesh import Mesh
from pypar.mesh_shape import MeshShape
from pypar.models import Decoder, DecoderConfig
from pypar.train import checkpoint
from tests.harness.forkserver import forkserver

LAYOUT_OF = {
    "embedding.weight": Layout((16, 8), (Cut(0, "tp"),)),
    "layers.0.norm.weight": Layout((8,)),
    "layers.0.q.weight": Layout((16, 8), (Cut(0, "tp"),)),
    "layers.1.out.weight": Layout((8, 16), (Cut(1, "tp"),)),
    "norm.weight": Layout((8,)),
}


def _state(mesh: Mesh, scale: float) -> dict[str, tuple[torch.Tensor, Layout]]:
    """This rank's part of a made-up model: the first two names on the first stage, the others on the last.

    The embedding is on both, as a tied one is.
    """
    state = {}
    for (i, name), kind in itertools.product(enumerate(LAYOUT_OF), ("model", "optimizer.exp_avg")):
        on_stages = {0 if i < 2 else mesh.pp.size - 1} | ({mesh.pp.size - 1} if i == 0 else set())
        if mesh.pp.rank in on_stages:
            layout = LAYOUT_OF[name]
            seed = torch.Generator().manual_seed(i + 100 * len(kind))
            whole = scale * torch.randn(layout.global_shape, generator=seed)
            state[f"{kind}.{name}"] = (local_part(whole, layout, mesh).clone(), layout)
    return state


def save_in_rank(directory: str, sizes: dict[str, int], step: int = 100) -> str:
    mesh = Mesh(**sizes)
    return str(checkpoint.save(Path(directory), step, _state(mesh, 1.0), mesh, {"note": sizes}))


def load_in_rank(path: str, sizes: dict[str, int]) -> list[str]:
    """Names that differ from what was written."""
    mesh = Mesh(**sizes)
    loaded, expected = _state(mesh, 0.0), _state(mesh, 1.0)
    assert checkpoint.load(Path(path), loaded, mesh)["step"] == 100
    return [name for name in expected if not loaded[name][0].equal(expected[name][0])]


LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"cp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"tp": 4}]


@pytest.mark.parametrize("written", LAYOUTS, ids=lambda sizes: str(MeshShape(sizes)))
def test_every_layout_reads_every_layout(ranks, tmp_path: Path, written: dict[str, int]) -> None:
    paths = ranks(math.prod(written.values()), save_in_rank, str(tmp_path), written)
    assert set(paths) == {str(tmp_path / "step_00000100")}
    for read in LAYOUTS:
        differing = ranks(math.prod(read.values()), load_in_rank, paths[0], read)
        assert differing == [[]] * len(differing), read
    manifest = checkpoint.check_readable(Path(paths[0]))
    assert manifest["extra"] == {"note": written}
    tensor_bytes = 2 * 4 * sum(math.prod(layout.global_shape) for layout in LAYOUT_OF.values())
    stored = sum(size for name, size in manifest["files"].items() if name.endswith(".safetensors"))
    assert tensor_bytes <= stored < tensor_bytes + 4096 * math.prod(written.values())  # what is shared: once


def save_to_no_folder(directory: str) -> str:
    mesh = Mesh(tp=2)
    with pytest.raises(RuntimeError) as failed:
        checkpoint.save(Path(directory), 1, _state(mesh, 1.0), mesh, {})
    return str(failed.value)


def load_more_on_one_rank(path: str) -> str:
    """The second stage asks for a tensor that is not there."""
    mesh = Mesh(pp=2)
    state = _state(mesh, 0.0)
    if mesh.pp.rank == 1:
        state["model.more"] = (torch.zeros(3), Layout((3,)))
    with pytest.raises(ValueError) as refused:
        checkpoint.load(Path(path), state, mesh)
    return str(refused.value)


def test_what_one_rank_meets_all_raise(ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = ranks(2, save_to_no_folder, str(tmp_path / "file"))
    assert said[0] == said[1] and "step_00000001 cannot be written: rank 0: FileExistsError" in said[0]
    said = ranks(2, load_more_on_one_rank, save_in_rank(str(tmp_path), {}))
    assert said[0] == said[1] and "does not hold model.more (it holds 'model.embedding.weight'" in said[0]


def _save(directory: Path, step: int) -> Path:
    return Path(save_in_rank(str(directory), {}, step))


def test_single_process_needs_no_process_group(tmp_path: Path, recwarn) -> None:
    path = _save(tmp_path, 100)
    assert load_in_rank(str(path), {}) == []
    assert checkpoint.read_extra(path) == {"note": {}}
    assert not recwarn.list


def test_latest_is_the_last_written_not_the_highest_step(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (10, 30, 20):
        newest = _save(tmp_path, step)
    assert checkpoint.latest(tmp_path) == newest == tmp_path / "step_00000020"
    checkpoint.keep_newest(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 3
    checkpoint.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_a_step_written_again_replaces_the_old(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    mesh = Mesh()
    checkpoint.save(tmp_path, 5, _state(mesh, 2.0), mesh, {})
    loaded = _state(mesh, 0.0)
    checkpoint.load(tmp_path / "step_00000005", loaded, mesh)
    assert loaded["model.norm.weight"][0].equal(_state(mesh, 2.0)["model.norm.weight"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_partial_one_is_never_taken_and_is_removed_by_the_next(tmp_path: Path) -> None:
    whole = _save(tmp_path, 5)
    partial = tmp_path / f"step_00000010{checkpoint.PARTIAL}"
    partial.mkdir()
    for file in whole.iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    assert checkpoint.survey(tmp_path) == ([whole], [])
    newest = _save(tmp_path, 15)
    assert checkpoint.latest(tmp_path) == newest and not partial.exists()


RANK_0 = "rank_00000.safetensors"


def _overwrite(file: Path, byte: bytes) -> None:
    """Other content of the same size."""
    file.write_bytes(byte * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: (p / checkpoint.MANIFEST).unlink(), "has no complete.json"),
        (lambda p: (p / checkpoint.MANIFEST).write_text("{"), "its complete.json is damaged"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"files": {}}'), "its complete.json is damaged"),
        (lambda p: (p / "index.json").unlink(), "index.json is missing"),
        (lambda p: os.truncate(p / RANK_0, 100), f"{RANK_0} has 100 bytes instead of"),
        (lambda p: _overwrite(p / "index.json", b"x"), "cannot be read: its index.json is damaged"),
        (lambda p: _overwrite(p / RANK_0, b"\0"), f"cannot be read: {RANK_0} is damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, sentence: str) -> None:
    older, path = _save(tmp_path, 5), _save(tmp_path, 10)
    damage(path)
    with pytest.raises(ValueError) as refused:
        checkpoint.check_readable(path)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    if not sentence.startswith("cannot be read"):  # same size: found when it is read
        assert checkpoint.latest(tmp_path) == older
        assert len(checkpoint.survey(tmp_path)[1]) == 1


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        checkpoint.check_readable(tmp_path / "nowhere")


def test_a_run_folder_stands_for_its_newest(tmp_path: Path) -> None:
    newest = _save(tmp_path / "checkpoints", 5)
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(tmp_path / "checkpoints") == newest
    assert checkpoint.resolve(newest) == newest
    assert checkpoint.resolve(tmp_path / "other") == tmp_path / "other"


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 5)
    mesh = Mesh()
    wrong = torch.zeros(16, 12)
    with pytest.raises(
        ValueError, match=r"holds model.embedding.weight of shape \[16, 8\] but the model has \[16, 12\]"
    ):
        checkpoint.load(path, {"model.embedding.weight": (wrong, Layout((16, 12)))}, mesh)
    with pytest.raises(ValueError, match="does not hold model.extra"):
        checkpoint.load(path, {"model.extra": (wrong, Layout((16, 12)))}, mesh)


SIZES = {"vocab_size": 16, "d_model": 8, "num_heads": 2, "num_kv_heads": 1, "head_size": 4, "d_ff": 12}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_compared_before_it_is_made(tmp_path: Path, tied: bool) -> None:
    sizes = DecoderConfig(**SIZES, num_layers=2, tied_embeddings=tied)
    mesh = Mesh()
    state = {f"model.{n}": (p.detach(), layout_of(p)) for n, p in Decoder(sizes).named_parameters()}
    written = dataclasses.asdict(sizes) | {"vocab_size": 0}  # 0: the tokenizer's
    path = checkpoint.save(tmp_path, 5, state, mesh, {"config": {"model": written}})
    checkpoint.check_readable(path, sizes)
    for key, value, held in (
        ("num_layers", 3, "2"),
        ("tied_embeddings", not tied, str(tied).lower()),  # false is not 0, which would follow from others
        ("norm_eps", 1e-6, "1e-05"),
    ):
        other = dataclasses.replace(sizes, **{key: value})
        with pytest.raises(ValueError, match=f"holds a model with {key} = {held} but the configuration says"):
            checkpoint.check_readable(path, other)
    with pytest.raises(ValueError, match=r"shape \[16, 8\] but the model has \[32, 8\]"):
        checkpoint.check_readable(path, dataclasses.replace(sizes, vocab_size=32))
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["extra"]["config"]["model"]["num_layers"] = 10**9  # and the weights of two
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="weights but the model of the configuration has"):
        checkpoint.check_readable(path, dataclasses.replace(sizes, num_layers=10**9))


def _save_endlessly(directory: Path, saved) -> None:
    mesh = Mesh()
    for step in range(1, 10**6):
        state = {"w": (torch.full((300_000,), float(step)), Layout((300_000,)))}
        checkpoint.save(directory, step, state, mesh, {})
        checkpoint.keep_newest(directory, 2)
        saved.send(step)


def test_a_writer_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at moments spread over the writing; whatever counts as complete must load and be whole."""
    mesh = Mesh()
    for trial in range(4):
        directory = tmp_path / str(trial)
        ours, theirs = forkserver().Pipe()
        writer = forkserver().Process(target=_save_endlessly, args=(directory, theirs), daemon=True)
        writer.start()
        theirs.close()  # a writer that fails ends what is received from it
        assert [ours.recv() for _ in range(3)] == [1, 2, 3]
        time.sleep(0.004 * trial)
        writer.kill()
        writer.join()
        ours.close()
        complete, faults = checkpoint.survey(directory)
        assert complete and not faults
        for path in complete:
            loaded = {"w": (torch.zeros(300_000), Layout((300_000,)))}
            step = checkpoint.load(path, loaded, mesh)["step"]
            assert (loaded["w"][0] == step).all()
