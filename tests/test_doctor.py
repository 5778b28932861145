"""The doctor's report."""

import torch

from pypar import doctor
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
    ):
        assert words in report
