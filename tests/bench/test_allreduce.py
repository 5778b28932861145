"""`pypar bench allreduce`: what it chooses and refuses; its loops on the host runtime's devices and on CPUs."""

import pytest
import torch

from pypar.bench import allreduce
from pypar.cli import main
from tests.comm.allreduce.peer_group import peer_group
from tests.harness.simt.build import simt_module, why_not

MIB = 1 << 20


def row(num_bytes, one_shot, two_shot, group):
    return num_bytes, {"one-shot": one_shot, "two-shot": two_shot, "group": group}


def test_thresholds_are_where_another_way_becomes_the_fastest():
    rows = [row(1024, 5, 8, 20), row(65536, 9, 8.9, 21), row(MIB, 40, 20, 40), row(64 * MIB, 900, 500, 300)]
    assert allreduce.best_thresholds(rows)[:2] == (1024, MIB)
    assert allreduce.best_thresholds([row(1024, 9, 9, 3), row(MIB, 90, 70, 30)])[:2] == (0, 0)
    assert allreduce.best_thresholds([row(1024, 3, 9, 9)])[:2] == (1024, 1024)


def test_one_disturbed_figure_moves_nothing():
    """The middle one looks a little worse by one-shot, which is far better before and after it."""
    rows = [row(1024, 5, 10, 20), row(2048, 11, 10, 20), row(4096, 5, 10, 20), row(8192, 50, 10, 20)]
    assert allreduce.best_thresholds(rows)[:2] == (4096, 8192)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_every_method_is_checked_and_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with peer_group(monkeypatch, simt_module("allreduce", "fast"), 3) as group:
        seconds = {"one-shot": 2.0, "two-shot": 1.0, "group": 3.0}

        def times(peer, rank):
            order = iter(allreduce.METHODS)
            return allreduce.times_of(
                peer, 512, torch.bfloat16, lambda call: (call(), seconds[next(order)])[1]
            )

        found = group.call(times)
        assert found == [seconds] * 3
        rows = [(512, found[0])]
        assert "two-shot" in allreduce.line_of(3, "bf16", rows[0])
        said = allreduce.keep(group.peers[0], 3, rows)
        assert "cpu, 3 ranks, cuda: one-shot up to 0 bytes, two-shot up to 512" in said
    with peer_group(monkeypatch, simt_module("allreduce", "fast"), 3) as group:
        assert group.peers[2].thresholds[:2] == (0, 512)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() > 1, reason="there are GPUs")
def test_without_two_gpus_one_sentence_and_status_1(capsys):
    assert main(["bench", "allreduce", "--tune"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("pypar bench: all-reduce between GPUs needs two of them, and torch finds ")
    assert not printed.out and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cpu", "--tune"], "--tune and --backend are about GPU kernels"),
        (["--ranks", "1"], "--ranks (1) must be 2 to"),
        (["--bytes", "100"], "--bytes (100) must be a positive multiple of 64; use 128"),
    ],
)
def test_refusals(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "allreduce", *arguments])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_on_cpus_our_backend_against_gloo(capfd):
    assert (
        main(["bench", "allreduce", "--device", "cpu", "--quick", "--bytes", "4096", "--dtypes", "fp32"]) == 0
    )
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("2 ranks  all_reduce      fp32       4096 B  pypar ") and "gloo" in line
