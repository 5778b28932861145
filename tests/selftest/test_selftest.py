"""`pypar selftest`: what it covers, what it finds, what it says."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import pypar.selftest as selftest
from pypar import cli
from pypar.bench import timing
from pypar.ops import native
from pypar.ops.attention.operator import BY_NAME
from pypar.ops.backend import op_modules
from pypar.selftest import judge, report, rows
from pypar.selftest.case import Case, Peer
from pypar.selftest.cases import linear
from pypar.selftest.cases.attention import fused

attention_module = sys.modules["pypar.ops.attention"]
OPS = [rows.op_name(module) for module in op_modules()]


def run(tmp_path, capsys, **options):
    """(exit code, what was printed, the JSON report) of a quick run."""
    path = tmp_path / "report.json"
    code = selftest.main(rows.Options(quick=True, **options), ["a machine"], path)
    return code, capsys.readouterr().out, json.loads(path.read_text())


@pytest.fixture
def small_limits(monkeypatch):
    """The machine's rates from small products and copies."""
    monkeypatch.setattr(timing, "_MATMUL_SIZES", {"cpu": (256, 256)})
    monkeypatch.setattr(timing, "_COPY_BYTES", {"cpu": 1 << 22})


@pytest.fixture
def few_cases(monkeypatch, small_limits):
    """Two small cases of attention in fp32, so that a test takes a second."""
    cases = [case for case in rows.cases_of("attention", False) if case.name in ("large heads", "bias")]
    monkeypatch.setattr(
        rows, "cases_of", lambda op, large: [dataclasses.replace(c, quick=True) for c in cases]
    )
    monkeypatch.setattr(rows, "DTYPES", (torch.float32,))


@pytest.fixture
def plant(monkeypatch, few_cases):
    """Replaces functions of attention's native backend."""

    def put(**functions):
        changed = dataclasses.replace(BY_NAME["native"], **functions)
        backends = tuple(changed if b.name == "native" else b for b in attention_module.BACKENDS)
        monkeypatch.setattr(attention_module, "BACKENDS", backends)
        monkeypatch.setitem(BY_NAME, "native", changed)
        return changed

    return put


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("large", [False, True])
def test_every_operator_has_cases_of_which_some_are_quick(op, large):
    cases = rows.cases_of(op, large)
    assert any(case.quick for case in cases) and any(not case.quick for case in cases)
    assert all(isinstance(case, Case) and isinstance(case.peer, Peer) for case in cases)
    assert len({(case.name, case.shape) for case in cases}) == len(cases)


def test_the_options_of_attention_are_covered():
    names = " ".join(case.name for case in rows.cases_of("attention", False))
    for word in ("causal", "grouped", "window", "several lengths", "softcap", "ALiBi", "bias", "sinks", "dropout",
                 "one query", "value heads", "two parts", "odd", "together"):  # fmt: skip
        assert word in names


@pytest.fixture
def small_linear(monkeypatch):
    """Some processors take seconds for a product in fp16."""
    cases_of, case = rows.cases_of, linear.case((203,), 128, 160, bias=False, quick=True)
    monkeypatch.setattr(rows, "cases_of", lambda op, large: [case] if op == "linear" else cases_of(op, large))


def test_a_quick_run_passes_and_writes_its_report(tmp_path, capsys, small_limits, small_linear):
    ops = ("rms_norm", "rope", "linear")
    code, printed, written = run(tmp_path, capsys, ops=ops)
    assert code == 0 and "\npassed: " in printed
    assert {row["op"] for row in written["rows"]} == set(ops)
    assert {row["dtype"] for row in written["rows"]} == {"float32", "bfloat16", "float16"}
    assert {row["backend"] for row in written["rows"]} >= {"native", "reference", "torch"}
    for row in written["rows"]:
        assert row["failure"] is None and 0 <= row["error"] <= row["allowed"]
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["forward_ratio"] > 0
        assert row["forward_share"] > 0 and row["limit"] in ("matmul", "copy")
    assert written["machine"] == ["a machine"] and written["copy_bytes_per_second"]["cpu"] > 1e8
    assert written["matmul_flops_per_second"]["cpu float32"] > 1e8
    if not torch.cuda.is_available():
        assert "everything on a GPU: torch" in printed
    assert "Not run:" in printed


def test_what_a_backend_refuses_is_listed_not_failed(tmp_path, capsys, small_limits, small_linear):
    code, printed, written = run(tmp_path, capsys, ops=("linear",), backends=("onednn",))
    assert all(row["dtype"] == "float32" for row in written["rows"])
    assert "linear onednn on cpu" in printed.split("Not run:")[1]
    assert code == (0 if written["rows"] else 1)


def test_a_wrong_result_fails(tmp_path, capsys, plant):
    right = BY_NAME["native"].forward

    def wrong(problem, carry):
        results = right(problem, carry)
        out = results.out
        out[..., -1] += 1e-4
        return results

    plant(forward=wrong)
    code, printed, written = run(tmp_path, capsys, ops=("attention",))
    assert code == 1 and "FAILED: 2 of 4 rows" in printed and "FAILED: out is off by 0.0001" in printed
    assert {row["backend"] for row in written["rows"] if row["failure"]} == {"native"}
    assert written["verdict"] == "FAILED: 2 of 4 rows"


def test_a_wrong_gradient_fails(tmp_path, capsys, plant):
    right = BY_NAME["native"].backward
    plant(backward=lambda *arguments: tuple(x * (1 + 1e-4) for x in right(*arguments)))
    code, printed, _ = run(tmp_path, capsys, ops=("attention",), backends=("native",))
    assert code == 1 and "FAILED: d" in printed and "FAILED: 2 of 2 rows" in printed


def test_a_result_that_is_not_a_number_fails(tmp_path, capsys, plant):
    right = BY_NAME["native"].backward
    plant(backward=lambda *arguments: tuple(torch.full_like(x, torch.nan) for x in right(*arguments)))
    code, printed, written = run(tmp_path, capsys, ops=("attention",), backends=("native",))
    assert code == 1 and "is off by inf" in printed and written["rows"][0]["error"] == "inf"
    assert judge.largest_error(torch.tensor([torch.inf]), torch.tensor([torch.inf]).double()) == 0


def test_a_backend_that_raises_fails_its_row_and_the_others_go_on(tmp_path, capsys, plant):
    def broken(problem, carry):
        raise RuntimeError("the kernel fell over\nat some length")

    plant(forward=broken)
    code, printed, written = run(tmp_path, capsys, ops=("attention",))
    assert code == 1 and "FAILED: RuntimeError: the kernel fell over\n" in printed
    assert [row["failure"] is None for row in written["rows"]] == [False, True, False, True]


def test_a_result_that_differs_from_run_to_run_fails(tmp_path, capsys, plant):
    right, calls = BY_NAME["native"].forward, []

    def unsteady(problem, carry):
        results = right(problem, carry)
        out = results.out
        calls.append(1)
        if len(calls) == 1:
            out[..., 0] = torch.nextafter(out[..., 0], out[..., 0] + 1)
        return results

    plant(forward=unsteady)
    code, printed, _ = run(tmp_path, capsys, ops=("attention",), backends=("native",))
    assert code == 1 and "FAILED: another run gives another out" in printed and "1 of 2 rows" in printed


def test_the_number_of_threads_must_not_matter(tmp_path, capsys, plant, monkeypatch):
    right = BY_NAME["native"].forward

    def threaded(problem, carry):
        results = right(problem, carry)
        out = results.out
        if native.num_threads() == 1:
            out[..., 0] = torch.nextafter(out[..., 0], out[..., 0] + 1)
        return results

    def in_one_thread(*arguments):  # of plain PyTorch's many small steps each would wait for a second one
        torch.set_num_threads(1)
        try:
            return expect_case(*arguments)
        finally:
            torch.set_num_threads(2)

    plant(forward=threaded)
    expect_case, before = judge.expect_case, torch.get_num_threads()
    monkeypatch.setattr(judge, "expect_case", in_one_thread)
    torch.set_num_threads(2)
    try:
        code, printed, _ = run(tmp_path, capsys, ops=("attention",), backends=("native",))
    finally:
        torch.set_num_threads(before)
    assert code == 1 and "FAILED: one thread gives another out" in printed


def test_an_operator_without_cases_is_named(monkeypatch):
    def missing(op, large):
        raise ModuleNotFoundError(op)

    monkeypatch.setattr(rows, "cases_of", missing)
    options = rows.Options(ops=("rope",))
    (item,) = rows.run(options, rows.Limits(options))
    assert item == rows.NotRun("rope", "it has no cases: pypar/selftest/cases/rope.py is missing")


def test_nothing_run_is_no_success():
    assert report.verdict([]) == ("FAILED: no row was run", 1)


@pytest.mark.parametrize(("T", "S"), [(7, 11), (11, 7), (5, 5), (1, 9), (0, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, None), (None, 2), (0, 0), (2, 4)])
def test_visible_pairs_are_counted_right(T, S, causal, window):
    sees = fused.visible(T, S, causal, window, "cpu")
    assert fused.visible_pairs(T, S, causal, window) == int(sees.sum())


def test_a_slow_contender_is_timed_once_and_a_fast_one_in_rounds():
    import time

    calls = {"slow": 0, "fast": 0}

    def slow():
        calls["slow"] += 1
        time.sleep(0.03)

    def fast():
        calls["fast"] += 1
        time.sleep(0.001)

    found = timing.times({"slow": slow, "fast": fast}, rounds=5, budget_s=0.02)
    assert calls["slow"] == len(found["slow"]) == 1
    assert len(found["fast"]) >= 3 and 0.001 <= min(found["fast"]) < 0.02


def test_the_command(tmp_path, capfd):
    path = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pypar.cli",
        "selftest",
        "--ops",
        "bucket",
        "--backends",
        "native",
        "--quick",
    ]
    result = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        f"{path} says it for a bug report" in result.stdout
        and "instruction sets of this CPU" in result.stdout
    )
    assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {"bucket"}
    for arguments, sentence in (
        (["--ops", "atention"], "--ops: unknown operator 'atention', known are adamw, attention, "),
        (["--backends", "cud"], "--backends: unknown backend 'cud', known are "),
        (["--json", str(tmp_path / "no" / "folder" / "x.json")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command[3:], *arguments])
        said = capfd.readouterr().err
        assert ended.value.code == 2 and sentence in said and said.count("\n") == 1
