"""bench/memory.py: who is raced, what is held over a step, and the ladder of the largest decoders."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch

from pypar.bench.training import ladder, race, timeline
from pypar.bench.training.contenders import SIZES, Workload
from pypar.bench.training.sharded import RUNNING, Running, missing, num_bytes
from pypar.cost.memory import Sharding, states
from tests import ROOT

TINY = Workload(
    "fp32",
    4,
    16,
    replace(SIZES, num_layers=2, d_model=64, num_heads=2, num_kv_heads=2, head_size=32, d_ff=96),
)


def test_a_timeline_has_every_byte_and_its_categories():
    """On one process: states as the formula says, the rest comes and goes, and nothing is left."""
    TINY.data()
    found = timeline.record(lambda: ladder.one_process(TINY))
    held = states(ladder.units_of(TINY), Sharding())
    for name in ("parameters", "gradients"):
        assert {each[name] for each in found.held} == {held[name]}
    least = sum(held.values())
    assert min(found.total) >= least and found.peak > least + 4 * 16 * TINY.sizes.vocab_size
    assert found.total[-1] < found.peak and len(found.seconds) == len(found.total) == len(found.held)
    assert found.seconds == sorted(found.seconds)


def test_categories_follow_what_happens_after_the_last_layer():
    """Gradients that are given up between backward and the end of a step are no gradients from then on."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(2))
    model.before = torch.nn.Linear(64, 64, bias=False)

    class Update:
        def zero(self):
            model.zero_grad()

    def gradients():
        return num_bytes(p.grad for p in model.parameters())

    def steps():
        while True:
            x = model.before(torch.ones(4, 64))
            for layer in model.layers:
                x = layer(x)
            x.sum().backward()
            update.zero()
            later = [torch.ones(1000) for _ in range(3)]
            yield float(len(later))

    update = Update()
    found = timeline.record(
        lambda: Running(steps(), model, lambda: {"gradients": gradients()}, [(update, "zero")])
    )
    size = 64 * 64 * 4
    told = [each["gradients"] for each in found.held]
    assert max(told) == 3 * size  # with those of what comes before the layers
    # From the start of backward on they grow, and after the update there are none, though allocations go on.
    assert told == sorted(told[: told.index(3 * size)]) + [3 * size] * told.count(3 * size) + [0] * (
        len(told) - told.index(3 * size) - told.count(3 * size)
    )
    assert told[-1] == 0 and told.count(0) > 3
    assert "zero" not in vars(update)


def test_the_ladder_is_as_high_as_the_budget_allows():
    workload = replace(TINY, sequences=2)
    budget = 8 << 20

    def beside(num_layers):
        return 5000 * num_layers + 70_000

    rungs = ladder.ladder(workload, budget, beside)
    assert [rung.name for rung in rungs] == ["none", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert rungs[0].num_layers < rungs[1].num_layers < rungs[2].num_layers < rungs[3].num_layers
    for rung in rungs:
        assert rung.num_bytes <= budget
        higher = ladder.with_layers(workload, rung.num_layers + 1)
        more = ladder.states_bytes(higher, Sharding(rung.stage, 2)) + beside(rung.num_layers + 1)
        assert more > budget
        sizes = ladder.with_layers(workload, rung.num_layers).sizes
        assert (
            sum(p.numel for p in ladder.units_of(replace(workload, sizes=sizes)).parameters())
            == sizes.num_parameters
        )
    assert not ladder.ladder(workload, 1 << 10, beside)


def test_a_peer_that_is_not_installed_says_how_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "pip install 'pypar-torch[peers]'" in missing("DeepSpeed ZeRO-3")
    assert missing("torch FSDP2") is None


def test_the_program_tells_figures_and_draws(tmp_path, monkeypatch, capsys):
    files = [str(tmp_path / name) for name in ("figures.json", "held.png")]
    arguments = ["--ladder", "--precision", "fp32", "--budget", "150", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments, "--json", files[0], "--picture", files[1]])
    runpy.run_path(str(ROOT / "bench" / "memory.py"), run_name="__main__")
    rungs = json.loads((tmp_path / "figures.json").read_text())["memory"]
    printed = capsys.readouterr().out
    assert all(f"| {rung['name']} | {rung['num_layers']} | " in printed for rung in rungs)
    assert (tmp_path / "held-fp32.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_contenders_train_alike(precision):
    """Losses that differ are an AssertionError of the race itself."""
    names = [name for name in RUNNING if missing(name) is None]
    results = race.race(names, replace(TINY, precision=precision), steps=1, rounds=1)
    assert not [result.failure for result in results.values() if result.failure]
    figures = race.figures(results, TINY, "memory")
    assert {figure.what for figure in figures} == {
        n.removeprefix("pypar ") for n in names if n.startswith("pypar")
    }
    assert all(figure.ratio for figure in figures)


@pytest.mark.slow
def test_the_program_races_and_watches(tmp_path, monkeypatch, capsys):
    files = [str(tmp_path / name) for name in ("figures.json", "held.png")]
    arguments = [
        "--precision",
        "fp32",
        "--only",
        "pypar zero 3",
        "FSDP2",
        "--sequences",
        "2",
        "--length",
        "16",
    ]
    arguments += ["--steps", "1", "--rounds", "1", "--json", files[0], "--picture", files[1]]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    runpy.run_path(str(ROOT / "bench" / "memory.py"), run_name="__main__")
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "| pypar zero 3 | " in printed and "| torch FSDP2 | " in printed
    assert [figure["what"] for figure in written["figures"]] == ["zero 3"]
    assert {each["what"] for each in written["memory"]} == {"pypar zero 3", "torch FSDP2"}
    assert all(0 < each["parameters"] < each["peak"] for each in written["memory"])
    assert (tmp_path / "held-fp32.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_what_the_ladder_predicts_is_what_is_held(stage):
    """One rung is really trained: never more than was predicted, and not much less."""
    workload = Workload("fp32", 2, 32, replace(SIZES, d_model=256, num_heads=4, num_kv_heads=2, d_ff=704))
    rungs = ladder.ladder(workload, 96 << 20, ladder.beside_states(workload))
    rung = next(rung for rung in rungs if rung.stage == stage)
    found = timeline.record_ranks(f"pypar zero {stage}", ladder.with_layers(workload, rung.num_layers))
    assert 0.8 * rung.num_bytes < found.peak <= rung.num_bytes
    assert torch.tensor(found.total).min() > 0
