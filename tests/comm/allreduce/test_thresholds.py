"""Which size takes which all-reduce: the shipped table and the file of measured values."""

import json

import pytest
import torch

from pypar.comm.allreduce import thresholds
from pypar.comm.allreduce.thresholds import SEEDS, SHIPPED, Thresholds

CPU = torch.device("cpu")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pypar" / "allreduce.json"


def test_method():
    at = Thresholds(100, 1000, "")
    assert [at.method(n) for n in (0, 100, 101, 1000, 1001)] == [
        "one-shot", "one-shot", "two-shot", "two-shot", "group",
    ]  # fmt: skip


@pytest.mark.parametrize("arch", SHIPPED)
def test_shipped_values_serve_every_number_of_ranks(arch):
    found = [thresholds.shipped(arch, num_ranks) for num_ranks in range(2, 9)]
    assert all(0 < at.one_shot_max_bytes <= at.two_shot_max_bytes and at.source == SEEDS for at in found)
    assert [at.one_shot_max_bytes for at in found] == sorted((at[0] for at in found), reverse=True)


def test_measured_values_replace_the_shipped_of_their_device_engine_and_number_of_ranks(cache):
    assert thresholds.cache_file() == cache
    measured = Thresholds(1, 2, "here")
    thresholds.store(cache, "cpu", "cuda", 4, Thresholds(7, 8, "here"))
    thresholds.store(cache, "cpu", "triton", 4, Thresholds(5, 6, "here"))
    thresholds.store(cache, "cpu", "cuda", 4, measured)
    found = thresholds.choose(CPU, "cuda", 4)
    assert found[:2] == measured[:2] and str(cache) in found.source
    assert thresholds.choose(CPU, "triton", 4)[:2] == (5, 6)
    assert thresholds.choose(CPU, "cuda", 2).source == SEEDS
    assert thresholds.tuned(cache, "another GPU", "cuda", 4) is None
    assert [path.name for path in cache.parent.iterdir()] == ["allreduce.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 10**5,
        " " * (1 << 20) + "{}",
        '{"cpu": 3}',
        '{"cpu": {"cuda": {"4": {}}}}',
        '{"cpu": {"cuda": {"4": 5}}}',
    ],
)
def test_a_damaged_file_is_named_and_replaced(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    found = thresholds.choose(CPU, "cuda", 4)
    assert found[:2] == thresholds.shipped("other", 4)[:2]
    assert f"{cache} cannot be read as thresholds" in found.source
    thresholds.store(cache, "cpu", "cuda", 4, Thresholds(1, 2, ""))
    assert thresholds.choose(CPU, "cuda", 4)[:2] == (1, 2)
    assert set(json.loads(cache.read_text())) == {"cpu"}
