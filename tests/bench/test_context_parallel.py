"""bench/context_parallel.py runs, checks its contenders against one process, and draws.

The long test draws by the program itself, whose ranks load torch anew.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from pypar.bench.context_parallel import timeline
from pypar.bench.context_parallel.step import Contender, Problem
from pypar.mesh import Axis
from tests import ROOT

BENCH = ROOT / "bench" / "context_parallel.py"


def run(*arguments):
    command = [sys.executable, str(BENCH), "--lengths", "512", "--dtypes", "bf16", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_row_for_every_contender():
    result = run("--rounds", "1", "--layouts", "zigzag", "--methods", "ring", "all_gather", "ulysses")
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| 2 ")]
    assert [row[3] for row in rows] == ["ring", "all_gather", "ulysses"]
    sent = [float(row[-1].strip(" |")) for row in rows]
    # Of 256 positions: k and v there, their gradients in fp32 back; both ways; and q, out and dq too.
    assert sent[0] == pytest.approx(256 * 2 * 128 * (2 + 4) / 1e6, abs=0.1) and sent[0] < sent[1] < sent[2]


def _spans():
    problem = Problem(512, torch.bfloat16, True)
    return timeline.recorded_step(Axis.of(dist.group.WORLD, "cp"), problem, Contender("ring", "zigzag"))


def test_the_timeline_is_a_picture(ranks, tmp_path):
    spans = ranks(2, _spans)
    for of_rank in spans:
        assert {span.kind for span in of_rank} == set(timeline.COLORS)
        assert all(span.began <= span.ended for span in of_rank)
    timeline.draw(spans, "two ranks", tmp_path / "ring.png")
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_program_draws_the_timeline(tmp_path):
    result = run("--timeline", str(tmp_path / "ring.png"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")
