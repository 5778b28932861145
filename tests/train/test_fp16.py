"""Runs in fp16: one verdict on all ranks, skipped updates change nothing, a resumed run goes on with its scale."""

import json
import math
from pathlib import Path

import pytest
import torch

from pypar.mesh import Mesh, parse_mesh
from pypar.train.config import RunConfig, load_config
from pypar.train.trainer import Trainer
from tests.harness.small_run import assignments, small_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16")
    (folder / "text.txt").write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(900)))
    return folder


def made(place: Path, mesh: str, **changes: object) -> Trainer:
    changes = {"train__precision": "fp16", "train__steps": 8, "mesh": mesh} | changes
    config = load_config(None, assignments(small_run(place, **changes)))
    return Trainer(config, Mesh.of(parse_mesh(mesh)), CPU)


def state(trainer: Trainer) -> dict:
    steps = {str(i): each["step"].clone() for i, each in enumerate(trainer.optimizer.update.state.values())}
    held = {name: x.clone() for name, (x, _) in trainer._state().items()}
    shown = {}
    if trainer.config.memory.zero < 3:  # else they are there while a block computes
        shown = {f"shown {i}": p.detach().clone() for i, p in enumerate(trainer.model.parameters())}
    return held | steps | shown | {"updates": trainer.step}


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(other[name])) for name, x in one.items())


def skips(place: Path, mesh: str, zero: int) -> list:
    """In each rank: for each step (skipped, scale, whether the state stayed as it was); then updates and samples."""
    trainer = made(place, mesh, memory__zero=zero)
    reduce, bad = trainer.store.reduce, {1: 1, 2: 0, 4: 1}  # step -> rank whose gradient becomes infinite
    norm = next(
        each for each in trainer.store.owned() if "norm" in each.name
    )  # alike on ranks of tp, and of dp

    found = []
    for step in range(6):

        def injected(step: int = step) -> None:
            reduce()
            if bad.get(step) == trainer.mesh.rank:
                norm.gradient[0] = math.inf

        trainer.store.reduce = injected
        before = state(trainer)
        line = trainer.train_step()
        found.append((line["skipped"], line["loss_scale"], equal(before, state(trainer))))
    return [*found, trainer.step, trainer.samples]


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        ("dp=2", 0),
        ("tp=2", 0),
        ("pp=2", 0),
        ("cp=2", 0),
        *(pytest.param("dp=2", n, marks=pytest.mark.slow) for n in (1, 3)),
    ],
)
def test_an_infinite_gradient_on_one_rank_skips_the_update_on_all(
    ranks, place: Path, mesh: str, zero: int
) -> None:
    good, half = 65536.0, 32768.0
    expected = [(False, good, False), (True, good, True), (True, good, True), (False, half, False),
                (True, half, True), (False, half / 2, False), 3, 24]  # fmt: skip
    assert ranks(2, skips, place, mesh, zero) == [expected] * 2


def test_it_learns_as_fp32_does_and_finds_its_scale(place: Path) -> None:
    changes = {"optimizer__lr": 1e-2, "optimizer__warmup_steps": 0, "optimizer__clip_norm": 0.5}
    half = made(place, "", loss_scale__initial=2.0**40, loss_scale__hysteresis=1, **changes)
    plain = made(place, "", train__precision="fp32", **changes)
    lines = []
    while half.step < 4:
        before = half.samples
        lines.append(half.train_step())
        if lines[-1]["skipped"]:
            half.samples = before  # the same data, to compare with
    skipped = [line for line in lines if line["skipped"]]
    assert len(skipped) > 5 and lines[len(skipped)]["loss_scale"] == 2.0 ** (40 - len(skipped))
    for line, other in zip(lines[len(skipped) :], (plain.train_step() for _ in range(4)), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=3e-2)
    assert half.evaluate(1) == pytest.approx(plain.evaluate(1), rel=5e-3)


def test_a_resumed_run_goes_on_with_its_scale_and_counters(place: Path) -> None:
    changes = {"loss_scale__growth_interval": 2, "loss_scale__initial": 2.0**15}
    whole, first = (made(place, "", **changes) for _ in range(2))
    for trainer in (whole, first):
        trainer.loss_scale.update(overflowed=True)
        for _ in range(3):
            trainer.train_step()
    path = first.save(place / "saved")
    second = made(place, "", **changes)
    second.load(path)
    assert (
        second.loss_scale.state()
        == whole.loss_scale.state()
        == {"value": 2.0**16, "good_steps": 1, "spare": 2}
    )
    for _ in range(2):
        assert second.train_step() == whole.train_step()
    assert equal(state(second), state(whole))
    other = made(place, "", **changes, train__precision="bf16")
    other.load(path)  # has no scale, and needs none
    again = made(place, "", **changes)
    again.load(other.save(place / "without"))
    assert again.loss_scale.state() == {"value": 2.0**15, "good_steps": 0, "spare": 2}


def test_a_run_writes_of_skipped_updates_and_ends_where_the_scale_is_too_small(place: Path) -> None:
    trainer = made(place, "", name="skips", train__steps=2, train__checkpoint_every=1, loss_scale__initial=2.0**33,
                   loss_scale__hysteresis=1)  # fmt: skip
    trainer.fit()
    lines = [
        json.loads(line) for line in (trainer.config.run_directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if not line["skipped"]] == [1, 2]
    skipped = [line for line in lines if line["skipped"]]
    assert skipped and all(line["grad_norm"] is None and "val_loss" not in line for line in skipped)
    short = made(place, "", loss_scale__initial=2.0**40, loss_scale__least=2.0**39, loss_scale__hysteresis=2)
    before = state(short)
    assert short.train_step()["skipped"] and short.train_step()["skipped"]
    with pytest.raises(
        RuntimeError, match="gradients are not finite with a loss scale of .*half of it is below loss_s"
    ):
        short.train_step()
    assert equal(before, state(short))


def test_other_precisions_have_no_scale_and_end_with_the_first_infinity(place: Path) -> None:
    trainer = made(place, "", train__precision="bf16")
    assert trainer.loss_scale is None and "loss_scale" not in trainer.train_step()
    reduce, owned = trainer.store.reduce, trainer.store.owned()[0]
    trainer.store.reduce = lambda: (reduce(), owned.gradient.fill_(math.nan))
    with pytest.raises(
        RuntimeError, match="the loss is .* and the gradient norm nan; the weights were not changed"
    ):
        trainer.train_step()
    assert RunConfig.from_dict({"train": {"precision": "fp16"}}).loss_scale.initial == 65536
