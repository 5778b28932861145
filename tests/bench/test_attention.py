"""bench/attention.py: what it counts, what it says of a case that is wrong or not there yet."""

import dataclasses
import importlib.util
import sys

import pytest
import torch

from tests import ROOT

BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_attention", BENCH / "attention.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def test_flops_are_those_of_visible_pairs(bench):
    by_name = {group.name: group for group in bench.groups(False)}
    causal, _ = by_name["causal"].cases[0]
    assert causal.flops[0] == 4 * 8 * 64 * (1024 * 1025 // 2) and causal.flops[1] == 2.5 * causal.flops[0]
    full, _ = by_name["full"].cases[1]
    assert full.flops[0] == 4 * 8 * 64 * 4096**2
    window, _ = by_name["window"].cases[0]
    assert window.flops[0] == 4 * 2 * 64 * (256 * 257 // 2 + (8192 - 256) * 256)
    lengths, _ = by_name["lengths"].cases[0]
    assert lengths.flops[0] == 4 * 4 * 64 * sum(n * (n + 1) // 2 for n in bench.LENGTHS)
    decode, _ = by_name["decode"].cases[0]
    assert bench.input_bytes(decode, torch.bfloat16) == 2 * 8 * 128 * (2 * 8192 + 1)


def test_a_backend_that_refuses_or_errs_is_a_line(bench, monkeypatch):
    case = bench.dense("causal", 5, 7, causal=True)

    def refuses(**inputs):
        raise ValueError("windows are missing")

    assert bench.failure(case, torch.float32) is None
    refused = dataclasses.replace(case, ours=refuses)
    assert bench.failure(refused, torch.float32) == "not supported: windows are missing"
    wrong = dataclasses.replace(case, ours=lambda backend, **inputs: case.plain(**inputs) * 1.01)
    assert bench.failure(wrong, torch.float32).startswith("WRONG: ")


def test_rows_and_summary(bench):
    setting = bench.Setting(1, "fp32", 1e11, 1e10, 0.001)
    group = bench.Group("small", [], {("fp32", "forward"): 0.0, ("fp32", "both"): 1e9})
    found = list(bench.rows(group, bench.dense("full", 5, 7), setting))
    assert [" forward " in line for line, _ in found] == [True, False]
    assert [line.endswith("<") for line, _ in found] == [False, True]
    outcomes = [outcome for _, outcome in found]
    lines = list(bench.summary(outcomes))
    assert "1 of 2 rows reach their target" in lines[0] and "both, 1 threads" in lines[1]
    assert lines[-1].startswith("worst ratio: ")
    decode = bench.Group("decode", [], {("fp32", "forward"): 0.0}, bandwidth_target=1e9)
    ((line, outcome),) = bench.rows(
        decode, bench.dense("one", 1, 4096, N=8, G=8, H=128, backward=False), setting
    )
    assert "GB/s" in line and outcome.missed and outcome.bandwidth < 1e9
