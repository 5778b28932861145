"""A trainer whose ranks have several stages of the model, and one whose store gathers and releases blocks."""

from pathlib import Path

import pytest
import torch

from pypar.blocks import global_parameters
from pypar.data_parallel import stores
from pypar.data_parallel.replicated import Replicated
from pypar.data_parallel.stores.around_blocks import around_blocks
from pypar.mesh import Mesh, parse_mesh
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import Action, Schedule
from pypar.pipeline_parallel.schedules import Registered
from pypar.train.config import RunConfig
from pypar.train.preflight import check
from pypar.train.trainer import Trainer
from tests.pipeline_parallel.stage import random_schedule

SMALL = {"num_layers": 5, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 48}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(600)))
    return path


def _config(text: Path, mesh: str, *, schedule: str = "one_f_one_b", **changes: object) -> RunConfig:
    return RunConfig.from_dict(
        {
            "mesh": mesh,
            "directory": str(text.parent / "runs"),
            "data": {"path": str(text), "cache_directory": str(text.parent / "cache")},
            "model": SMALL | {name: value for name, value in changes.items() if name in ("tied_embeddings",)},
            "optimizer": {"eps": 1e-6},
            "train": {"steps": 4, "batch_size": 4, "microbatch_size": 1, "sequence_length": 24},
            "pipeline": {"schedule": schedule},
        }
    )


def _in_turns(num_ranks: int, num_microbatches: int) -> Schedule:
    """Stages 0, 1, 2, 3 on ranks 0, 1, 0, 1 where there are two."""
    return random_schedule([stage % num_ranks for stage in range(4)], num_microbatches, seed=1)


def _back_and_forth(num_ranks: int, num_microbatches: int) -> Schedule:
    """The first and the last stage on rank 0."""
    return random_schedule([0, 1, 1, 0], num_microbatches, seed=1)


def _two_paths(num_ranks: int, num_microbatches: int) -> Schedule:
    return Schedule.of([[Action("F", 0, 0), Action("F", 0, 1, 1)]] * num_ranks)


class _Evicting(Replicated):
    """Outside a block's forward and backward its parameters are not numbers."""

    def __init__(self, models, mesh, **options) -> None:
        named = [each for model in models for each in global_parameters(model)]
        super().__init__(named, mesh, **options)
        self.named, self.away, self.calls = dict(named), {}, []
        for model in models:
            around_blocks(model, self)

    def enter(self, block, *, backward=False) -> None:
        if block.modules:  # not the root
            self.calls.append(("enter", block.name))
            self._bring(block.modules)

    def abandon(self) -> None:
        self.calls.append(("abandon", ""))

    def leave(self, block, *, backward=False, returns=False) -> None:
        if not block.modules:
            return
        self.calls.append(("leave", block.name))
        for name, parameter in self.named.items():
            if name.startswith(tuple(f"{module}." for module in block.modules)):
                self.away[name] = parameter.data.clone()
                parameter.data.fill_(torch.nan)

    def _bring(self, modules) -> None:
        for name in [n for n in self.away if n.startswith(tuple(f"{module}." for module in modules))]:
            self.named[name].data.copy_(self.away.pop(name))

    def reduce(self) -> None:
        super().reduce()
        for name in list(self.away):
            self.named[name].data.copy_(self.away.pop(name))


def _register(monkeypatch, evicts: bool = False) -> None:
    added = tuple(
        Registered(name, make, "A schedule of the tests.")
        for name, make in (
            ("in_turns", _in_turns),
            ("back_and_forth", _back_and_forth),
            ("two_paths", _two_paths),
        )
    )
    monkeypatch.setattr(schedules, "REGISTRY", (*schedules.REGISTRY, *added))
    if evicts:
        monkeypatch.setitem(
            stores.STORES,
            "replicated",
            lambda models, mesh, bucket_bytes, config: _Evicting(models, mesh, bucket_bytes=bucket_bytes),
        )


def run(config: RunConfig, path: Path | None = None, evicts: bool = False):
    """In each rank: losses of four steps and of an evaluation, this rank's weights, and the trainer's store."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _register(monkeypatch, evicts)
        trainer = Trainer(config, Mesh.of(parse_mesh(config.mesh)), CPU)
        losses = [trainer.train_step()["loss"] for _ in range(3)]
        if path is not None:  # go on from a checkpoint
            trainer.load(trainer.save(path))
        losses += [trainer.train_step()["loss"], trainer.evaluate(1)]
        named = [each for model in trainer.models for each in global_parameters(model)]
        return losses, {name: p.detach().clone() for name, p in named}, getattr(trainer.store, "calls", [])


@pytest.mark.parametrize("tied", [False, True])
def test_several_stages_on_a_rank_train_as_one_process(ranks, text: Path, tmp_path: Path, tied: bool) -> None:
    expected, whole, _ = run(_config(text, "", tied_embeddings=tied))
    config = _config(text, "pp=2", schedule="in_turns", tied_embeddings=tied)
    found = ranks(2, run, config, tmp_path)
    held = [set(weights) for _, weights, _ in found]
    assert held[0] | held[1] == set(whole)
    assert held[0] & held[1] == ({"embedding.weight"} if tied else set())
    for losses, weights, _ in found:
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-5)


def run_refused(config: RunConfig) -> str:
    with pytest.raises(ValueError) as refused:
        run(config)
    return str(refused.value)


def test_what_the_ends_of_a_schedule_share_is_refused(ranks, text: Path) -> None:
    tied = _config(text, "pp=2", schedule="back_and_forth", tied_embeddings=True)
    first, second = ranks(2, run_refused, tied)
    assert first == second and first.startswith(
        "this schedule has the first and the last stage on ranks 0 and 0 of pp, and they share parameters"
    )


def test_a_schedule_that_a_run_cannot_have_is_refused_before_a_rank_starts(text: Path, monkeypatch) -> None:
    _register(monkeypatch)
    for schedule, pp, sentence in (
        (
            "two_paths",
            2,
            "pipeline schedule two_paths has 2 copies of each stage, and a run trains one of each",
        ),
        (
            "in_turns",
            2,
            "(3) must be at least 4, the stages of the pipeline schedule in_turns on 2 ranks",
        ),
        ("chimera", 2, "pipeline schedule chimera has 2 copies of each stage"),
        ("seq1f1b", 2, "cuts every sequence into 4 segments, and a run does not keep keys and values"),
        ("pipedream", 2, "updates weights while microbatches are in flight"),
        ("auto", 2, "pipeline.schedule 'auto' needs pipeline.costs"),
    ):
        config = _config(text, f"pp={pp}", schedule=schedule)
        config = RunConfig.from_dict(config.to_dict() | {"model": SMALL | {"num_layers": 3}})
        with pytest.raises(ValueError) as refused:
            check(config)
        assert sentence in str(refused.value)


def test_the_fastest_schedule_is_filled_in_before_a_rank_starts(text: Path) -> None:
    values = _config(text, "pp=2", schedule="auto").to_dict()
    values["pipeline"] |= {"costs": "F=2,I=2,W=1,comm=0.1"}
    ready = check(RunConfig.from_dict(values))
    assert ready.config.pipeline.schedule in schedules.names()
    (why,) = [note for note in ready.notes if note.startswith("pipeline.schedule: ")]
    assert f"{ready.config.pipeline.schedule} is the fastest of" in why


def test_a_store_that_gathers_blocks_is_asked_around_each_of_them(ranks, text: Path) -> None:
    """Were one block missed, forward or backward would compute with what is not a number."""
    expected, whole, calls = run(_config(text, ""))
    assert not calls
    for config in (_config(text, ""), _config(text, "pp=2", schedule="in_turns")):
        size = parse_mesh(config.mesh).grid.num_ranks
        arguments = config, None, True
        for losses, weights, calls in [run(*arguments)] if size == 1 else ranks(size, run, *arguments):
            assert losses == pytest.approx(expected, rel=1e-5)
            assert all(torch.isnan(weight).all() for weight in weights.values())  # after an evaluation
            assert [what for what, _ in calls] == ["enter", "leave"] * (len(calls) // 2)
            assert all(calls[i][1] == calls[i + 1][1] for i in range(0, len(calls), 2))


def test_a_forward_that_fails_leaves_the_block_it_was_in(text: Path, monkeypatch) -> None:
    _register(monkeypatch, evicts=True)
    trainer = Trainer(_config(text, ""), Mesh(), CPU)
    layer = trainer.model.layers["0"]
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train_step()
    assert trainer.store.calls[-2:] == [("enter", "layers.0"), ("leave", "layers.0")]
    assert all(torch.isnan(p).all() for p in layer.parameters())


def test_a_store_that_does_not_act_on_blocks_costs_nothing(text: Path) -> None:
    model = Trainer(_config(text, ""), Mesh(), CPU).model
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
