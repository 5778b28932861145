"""A rank is killed in the middle of a run: what the user sees, what is left, what a restart gives.

The quick test kills the restarted run's launcher once the steps that were done again are seen; the long one compares
the whole run with one that nothing broke.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pypar.train.metrics import Metrics
from tests.harness.small_run import set_arguments, small_run

STEPS = 30


def _command(text: Path, directory: Path, name: str, *more: str) -> list[str]:
    run = small_run(
        directory,
        directory=directory,
        data__path=text,
        model__d_model=64,
        model__d_ff=128,
        train__steps=STEPS,
        train__microbatch_size=2,
        train__sequence_length=64,
        train__checkpoint_every=5,
    )
    command = [sys.executable, "-m", "pypar.cli", "train", "--name", name, "--mesh", "dp=2", *more]
    return command + set_arguments(run)


def _processes(mark: str) -> dict[int, dict[str, str]]:
    """Environment of each live process whose command line or environment carries ``mark``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        variables = dict(v.split("=", 1) for v in environment if "=" in v)
        if variables.get("PYPAR_TEST_MARK") == mark and state != "Z":
            found[int(entry.name)] = variables
    return found


def _losses(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in Metrics.read(directory / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "text.txt"
    path.write_text("".join(f"line {i} is {i * i % 97}\n" for i in range(6000)))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_job_and_a_restart_continues_bitwise(text: Path) -> None:
    """What was trained after a checkpoint is trained again, to the same losses. The launcher takes its ranks along."""
    done = _killed(text.parent, text, "killed")
    mark = f"launcher-{os.getpid()}"
    job = _start(text.parent, text, "killed", mark, "--resume")
    _wait_for_steps(job, text.parent, "killed", lambda found: [*done, *found][-1][0] > done[-1][0])
    assert len(_processes(mark)) >= 3  # the launcher and two ranks
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 30
    while _processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes(mark) == {}
    continued = _losses(text.parent, "killed")
    assert continued[: len(done)] == done
    assert [step for step, _ in continued] == list(range(1, len(continued) + 1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_run_that_was_killed_ends_as_one_that_was_not(text: Path, zero: int) -> None:
    stage, broken, unbroken = ("--set", f"memory.zero={zero}"), f"broken-{zero}", f"unbroken-{zero}"
    subprocess.run(
        _command(text, text.parent, unbroken, *stage), check=True, capture_output=True, timeout=180
    )
    _killed(text.parent, text, broken, *stage)
    command = _command(text, text.parent, broken, "--resume", *stage)
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    assert _losses(text.parent, broken) == _losses(text.parent, unbroken)


def _start(directory: Path, text: Path, name: str, mark: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(text, directory, name, *more),
        env=os.environ | {"PYPAR_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def _wait_for_steps(
    job: subprocess.Popen[str], directory: Path, name: str, enough: Callable[[list[tuple[int, float]]], bool]
) -> None:
    """Returns when the losses that the run has written are enough, or it has ended."""
    deadline = time.monotonic() + 120
    while not enough(_losses(directory, name)) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _killed(directory: Path, text: Path, name: str, *more: str) -> list[tuple[int, float]]:
    """The losses up to the death of a rank, after which the last checkpoint is taken away."""
    shared_memory_before = set(os.listdir("/dev/shm"))
    mark = f"{name}-{os.getpid()}"
    job = _start(directory, text, name, mark, *more)
    _wait_for_steps(job, directory, name, lambda found: len(found) >= 11)
    victim = next(pid for pid, v in _processes(mark).items() if v.get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = job.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert job.returncode == 1
    assert "rank 1" in errors and "SIGKILL" in errors
    assert "Traceback" not in errors
    while _processes(mark) and time.monotonic() < killed_at + 30:
        time.sleep(0.1)
    assert _processes(mark) == {}
    left = set(os.listdir("/dev/shm")) - shared_memory_before  # programs beside make their own
    assert not [name for name in left if "pypar" in name or name.startswith("torch_")]
    done = _losses(directory, name)
    assert 11 <= len(done) < STEPS
    # From the last checkpoint but one there are steps to train again, whenever the rank died.
    *_, older, newest = sorted((directory / name / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    assert int(older.name.removeprefix("step_")) + 5 <= len(done)
    return done
