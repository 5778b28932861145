"""`pypar train` under torchrun: it joins the ranks that are there, on several nodes; one node is the long test."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pypar.mesh import Mesh
from pypar.train.config import load_config
from pypar.train.metrics import Metrics
from pypar.train.trainer import Trainer
from tests.harness.small_run import assignments, set_arguments, small_run

NUM_STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("torchrun")
    (place / "text.txt").write_text("".join(f"{i} and {i} makes {2 * i}\n" for i in range(1500)))
    return place


def _train(place: Path, name: str, *more: str) -> list[str]:
    return ["-m", "pypar.cli", "train", "--name", name, *more, *set_arguments(_run(place))]


def _run(place: Path) -> dict[str, Any]:
    return small_run(place, directory=place, train__steps=NUM_STEPS, train__sample_tokens=0)


def _torchrun(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _losses(place: Path, name: str) -> list[float]:
    return [line["loss"] for line in Metrics.read(place / name / "metrics.jsonl")]


def _alone(sets: list[str]) -> list[float]:
    run = load_config(None, sets)
    trainer = Trainer(run, Mesh(), torch.device("cpu"))
    return [trainer.train_step()["loss"] for _ in range(NUM_STEPS)]


@pytest.fixture
def alone(ranks, place: Path) -> list[float]:
    """The losses of one process."""
    return ranks(1, _alone, assignments(_run(place)))[0]


def test_two_nodes_train_like_one_process(place: Path, alone: list[float]) -> None:
    rendezvous = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two")
    rendezvous += ("--rdzv-endpoint", f"localhost:{_free_port()}")
    nodes = [_torchrun(*rendezvous, *_train(place, "nodes", "--mesh", "dp=2")) for _ in range(2)]
    for node in nodes:
        said, _ = node.communicate(timeout=120)
        assert node.returncode == 0, said
    assert _losses(place, "nodes") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_one_node_trains_like_one_process(place: Path, alone: list[float]) -> None:
    job = _torchrun("--standalone", "--nproc-per-node", "2", *_train(place, "joined", "--mesh", "tp=2"))
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert _losses(place, "joined") == pytest.approx(alone, rel=1e-5)


def test_overwrite_is_refused_where_ranks_may_be_started_again(place: Path) -> None:
    job = _torchrun(
        *("--standalone", "--nproc-per-node", "1", "--max-restarts", "2"),
        *_train(place, "again", "--overwrite"),
    )
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "--overwrite under torchrun --max-restarts would delete" in said


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
