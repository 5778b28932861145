"""The doctor's report."""

import re
from types import SimpleNamespace

import pytest
import torch

from pypar import doctor
from pypar.comm.allreduce.thresholds import Thresholds
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
        "linear in bfloat16 on CPU: ",
        "all-reduce between GPUs by cuda: ",
        "all-reduce between GPUs by triton: ",
        "peers: ",
        "torch.distributed: ",
        "ranks on cpu: pypar takes pypar",
    ):
        assert words in report


def test_every_back_end_of_torch_distributed_is_asked_for(monkeypatch):
    backend = torch.distributed.Backend
    lines = dict(line.split(": ", 1) for line in doctor.distributed_lines())
    there = re.sub(r" \([^)]*\)", "", lines["torch.distributed"]).split(", ")
    absent = lines.get("torch.distributed is built without", "").split(", ")
    assert {*there, *absent} - {""} == {*backend.backend_list} - {"undefined"}
    assert "pypar" in there and "gloo (cpu" in lines["torch.distributed"]
    for name in ("gloo", "nccl", "mpi", "ucc"):
        is_there = getattr(torch.distributed, f"is_{name}_available")()
        assert (name in there, name in absent) == (is_there, not is_there)
    assert lines["ranks on cpu"] == "pypar takes pypar"
    if not torch.cuda.is_available():
        assert lines["ranks on cuda"] == "pypar takes nccl, which is not there: torch finds no GPU"

    monkeypatch.setattr(backend, "backend_list", [*backend.backend_list, "theirs"])
    monkeypatch.setattr(
        backend, "backend_capability", backend.backend_capability | {"theirs": ["cpu", "npu"]}
    )
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = list(doctor.distributed_lines())
    assert ", theirs (cpu, npu)" in report[0] and "nccl (cuda)" in report[0]
    assert report[-1] == "ranks on cuda: pypar takes nccl"
    monkeypatch.setattr(doctor.native, "missing", lambda: "it is not built")
    assert (
        "ranks on cpu: pypar takes pypar, which is not there: it is not built" in doctor.distributed_lines()
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_runs_on_a_gpu_that_is_not_there():
    rows, reasons = doctor.support_table()
    assert not any("yes" in row[3:] for row in rows if row[2] == "cuda")
    assert "torch finds no GPU" in reasons


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
