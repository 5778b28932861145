"""The doctor's report."""

from types import SimpleNamespace

import torch

from pypar import doctor
from pypar.comm.allreduce_thresholds import Thresholds
from pypar.ops.backend import op_modules
from pypar.ops.rms_norm import BACKENDS


def test_every_operator_and_backend_is_in_the_table():
    rows, _ = doctor.support_table()
    expected = {(m.__name__.rsplit(".", 1)[1], b.name) for m in op_modules() for b in m.BACKENDS}
    assert {(row[0], row[1]) for row in rows[1:]} == expected
    assert len(rows) == 1 + 2 * len(expected)


def test_every_operator_runs_on_the_cpu_in_the_training_dtypes():
    rows, _ = doctor.support_table()
    for operator in {row[0] for row in rows[1:]}:
        on_cpu = [row for row in rows if row[0] == operator and row[2] == "cpu"]
        for dtype in ("float32", "bfloat16"):
            assert any(row[rows[0].index(dtype)] == "yes" for row in on_cpu), (operator, dtype)


def test_the_cells_are_the_backends_own_answers():
    native = BACKENDS[0]
    assert doctor.ask(native.unsupported, "cpu", torch.float32) is None
    assert "float64 is not one of" in doctor.ask(native.unsupported, "cpu", torch.float64)
    assert "runs on the CPU" in doctor.ask(native.unsupported, "cuda", torch.float32)


def test_the_report_names_what_a_user_asks_for(capsys):
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for words in (
        "torch 2",
        "native module",
        "instruction sets of this CPU",
        "GPU",
        "linear in fp32 on CPU: ",
        "all-reduce between GPUs by cuda: ",
        "all-reduce between GPUs by triton: ",
        "peers: ",
    ):
        assert words in report


def test_gpus_that_cannot_reach_each_other_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: (i, j) != (2, 0))
    monkeypatch.setattr(doctor, "ENGINES", {"cuda": SimpleNamespace(unsupported=lambda device: "not built")})
    seeds = Thresholds(10, 20, "tried")
    monkeypatch.setattr(doctor, "choose_thresholds", lambda device, name, size: seeds)
    assert list(doctor.all_reduce_lines()) == [
        "all-reduce between GPUs by cuda: not built",
        "peers: no access 2 -> 0; PeerAllReduce tries a real copy",
        "all-reduce of 3 GPUs by cuda: one-shot up to 10 bytes, two-shot up to 20, beyond that the group's own (tried)",
    ]
