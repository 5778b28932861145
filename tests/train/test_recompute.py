"""Runs whose layers are computed again in backward: the same bits on every mesh, and the bytes of the formula."""

import math
from pathlib import Path

import pytest
import torch

from pypar.data_parallel import stores
from pypar.mesh import Mesh, parse_mesh
from pypar.models.activations import Microbatch, layer_bytes
from pypar.ops import native
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.schedules import Registered
from pypar.recomputation import SavedBytes
from pypar.recomputation.apply import recomputed
from pypar.recomputation.operators import COSTLY
from pypar.settings import check_values
from pypar.train.config import RunConfig
from pypar.train.preflight import check
from pypar.train.trainer import Trainer
from tests.pipeline_parallel.stage import random_schedule
from tests.train.test_stages_and_stores import _Evicting

CPU = torch.device("cpu")
SIZES = {"num_layers": 3, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48}
LENGTH, SEQUENCES = 24, 2
# More is in flight; the memory of what a stage receives is another in the second step, so that two steps are watched.
IN_PARTS = {"budget": "300KB", "steps": 5}
LAYOUTS = (  # mesh, changes of a run
    ("tp=2", {"sequence_parallel": True}),
    ("cp=2", {}),
    ("pp=2", {"schedule": "split", **IN_PARTS}),
    ("", {"evicts": True}),  # parameters are there around blocks only
    ("dp=2", {"zero": 3, "tiles": 3}),
)
MORE_LAYOUTS = (
    ("dp=2", {}),
    ("tp=2", {}),
    ("cp=2", {"method": "all_gather", "layout": "contiguous"}),
    ("cp=2", {"method": "ulysses", "packed_documents": True}),
    ("pp=2", {}),
    ("cp=2,tp=2", {"sequence_parallel": True, "precision": "bf16"}),
    ("dp=2,pp=2", {"schedule": "split", "packed_documents": True, **IN_PARTS}),
    ("dp=2,tp=2", {"zero": 3, "sequence_parallel": True}),
    ("cp=2,tp=2", {"tiles": 2, "sequence_parallel": True}),
    ("pp=2", {"tiles": 2, "schedule": "split", **IN_PARTS}),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(600)))
    return path


def _config(text: Path, mesh: str, recompute: dict, changes: dict) -> RunConfig:
    sections: dict = {
        "train": ("sequence_parallel", "packed_documents", "precision"),
        "context": ("method", "layout"),
    }
    given = {name: {k: changes[k] for k in keys if k in changes} for name, keys in sections.items()}
    train = {"steps": 4, "batch_size": 4, "microbatch_size": 1, "sequence_length": LENGTH}
    return RunConfig.from_dict(
        {
            "mesh": mesh,
            "directory": str(text.parent / "runs"),
            "data": {"path": str(text), "cache_directory": str(text.parent / "cache")},
            "model": SIZES,
            "train": train | given["train"],
            "context": given["context"],
            "pipeline": {"schedule": changes.get("schedule", "one_f_one_b")},
            "memory": {
                "zero": changes.get("zero", 0),
                "activation_bytes": recompute.get("activation_bytes", ""),
            },
            "recompute": {k: v for k, v in recompute.items() if k != "activation_bytes"}
            | ({"tiles": changes["tiles"]} if "tiles" in changes else {}),
        }
    )


def _register(monkeypatch: pytest.MonkeyPatch, evicts: bool) -> None:
    def split(num_ranks: int, num_microbatches: int):
        return random_schedule([s % num_ranks for s in range(3)], num_microbatches, seed=2, splits=True)

    added = Registered("split", split, "A schedule of the tests.")
    monkeypatch.setattr(schedules, "REGISTRY", (*schedules.REGISTRY, added))
    if evicts:
        monkeypatch.setitem(
            stores.STORES,
            "replicated",
            lambda models, mesh, bucket_bytes, config: _Evicting(models, mesh, bucket_bytes=bucket_bytes),
        )


def run(text: Path, mesh: str, changes: dict, policies: list[dict]) -> list:
    """In each rank: for each policy (losses, weights, names of layers that are computed again, bytes sent by axis)."""
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        _register(monkeypatch, changes.get("evicts", False))
        for recompute in policies:
            config = _config(text, mesh, recompute, changes)
            trainer = Trainer(config, Mesh.of(parse_mesh(config.mesh)), CPU)
            losses = [trainer.train_step() for _ in range(changes.get("steps", 2))]
            sent = {name: trainer.mesh.axis(name).traffic.bytes_sent for name in ("tp", "cp")}
            weights = {owned.name: owned.master.detach().clone() for owned in trainer.store.owned()}
            layers = [name for model in trainer.models for name in recomputed(model)]
            found.append((losses, weights, layers, sent))
            if trainer.activations is not None:
                plan = trainer.activations.plan
                assert plan is not None and trainer.activations.measured_bytes == plan.peak_bytes
                assert plan.peak_bytes <= trainer.activations.budget_bytes
    return found


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)],
    ids=str,
)
def test_every_layout_trains_to_the_same_bits(ranks, text: Path, mesh: str, changes: dict) -> None:
    moving = {"offload": True, "offload_min_bytes": 1}
    policies = [
        *({}, {"policy": "full"}, {"policy": "selective"}, moving, moving | {"policy": "full"}),
        {"activation_bytes": changes.get("budget", "90KB"), "offload_min_bytes": 1},
    ]
    size = math.prod(int(part.split("=")[1]) for part in mesh.split(",") if part)
    results = (
        ranks(size, run, text, mesh, changes, policies) if size > 1 else [run(text, mesh, changes, policies)]
    )
    for plain, *others in results:
        assert plain[2] == []
        for losses, weights, layers, _ in others:
            assert layers
            assert all(torch.equal(weights[name], plain[1][name]) for name in plain[1])
            assert losses == plain[0]
        none, full, selective, moved, *_ = (each[3] for each in (plain, *others))
        assert moved == none
        assert none["tp"] == selective["tp"] and (none["tp"] < full["tp"] or not none["tp"])
        if none["cp"] and changes.get("method") != "ulysses":  # beside what ranks agree on before a ring
            assert selective["cp"] - none["cp"] < 0.1 * (full["cp"] - none["cp"])


def held(text: Path, mesh: str, changes: dict) -> list[tuple[str, int, int]]:
    """In each rank: of each policy (its name, the bytes that a layer keeps, the formula's)."""
    found = []
    for policy in ("none", "full", "selective"):
        config = _config(text, mesh, {"policy": policy}, changes)
        trainer = Trainer(config, Mesh.of(parse_mesh(config.mesh)), CPU)
        tp = trainer.mesh.tp.size
        cut = changes.get("sequence_parallel", False)
        x = torch.ones(SEQUENCES, LENGTH // tp if cut else LENGTH, SIZES["d_model"], requires_grad=True)
        tables = trainer.model.rope_tables(torch.arange(LENGTH))
        with SavedBytes(trainer.model) as saved:
            out = trainer.model.layers["1"](x, *tables)
        given = Microbatch(
            SEQUENCES, LENGTH, 4, tp, cut, "tiles" in changes, lse_copies=1 if native.missing() else 2
        )
        expected = layer_bytes(
            trainer.model.config,
            given,
            recomputed=policy != "none",
            kept=COSTLY if policy == "selective" else (),
        )
        found.append((policy, saved.num_bytes - sum(x.nbytes for x in tables), expected))
        out.sum().backward()
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "tiles": 2}], ids=str
)
def test_a_rank_of_tensor_parallelism_keeps_what_the_formula_says(ranks, text: Path, changes: dict) -> None:
    for found in ranks(2, held, text, "tp=2", changes):
        for policy, measured, expected in found:
            assert measured == expected, policy


def test_a_configuration_that_cannot_be_is_refused(text: Path) -> None:
    config = _config(text, "", {"policy": "full", "ops": ["attention"]}, {})
    with pytest.raises(
        ValueError, match='recompute.ops names what the policy "selective" keeps, and recompute.policy'
    ):
        check(config, 1)
    config = _config(text, "", {"policy": "full", "activation_bytes": "2GB"}, {})
    with pytest.raises(
        ValueError, match=r"memory.activation_bytes \('2GB'\) chooses for each .*recompute.policy"
    ):
        check(config, 1)
    for recompute, sentence in (
        ({"activation_bytes": "2 GByte"}, "memory.activation_bytes: '2 GByte' is no number of bytes"),
        (
            {"policy": "fully"},
            "recompute.policy 'fully' is not one of none, full, selective; did you mean 'full'",
        ),
        (
            {"policy": "selective", "ops": "attention, liner"},
            "recompute, ops: unknown operator 'liner'.*'linear'",
        ),
        ({"every": 0}, r"recompute.every \(0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_values(_config(text, "", recompute, {}))
