"""The GPU all-reduce's rules, broken one at a time under the host runtime: every fault is found."""

import re

import pytest
import torch

from tests.gpu.allreduce.peer_ranks import check_calls, draw, peer_ranks, rank_sum
from tests.harness.simt.build import simt_module, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


# ---- planted faults


def find_fault(monkeypatch, fault, two_shot, seed):
    """What is said of the kernels with this fault; empty if nothing is noticed."""
    monkeypatch.setenv("PYPAR_FAULT", fault)
    module = simt_module("allreduce", "checked")
    try:
        check_calls(
            module, 2, [130] * 8, torch.float32, [two_shot], seed=seed, num_blocks=[2], timeout_ms=1000
        )
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


RACE = "race: device . block .* area . .* and no release and acquire is between"


@pytest.mark.parametrize(
    ("fault", "two_shot", "message"),
    [
        ("no release", False, RACE),
        ("no release", True, RACE),
        ("no acquire", False, RACE),
        ("no acquire", True, RACE),
        ("no barrier", False, RACE),
        ("one buffer", False, RACE),
        ("one buffer", True, RACE),
        ("another block's items", True, RACE),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_broken_rules_are_found(monkeypatch, fault, two_shot, message, seed):
    assert re.search(message, find_fault(monkeypatch, fault, two_shot, seed))


def test_one_set_of_flags_ends_in_a_time_out(monkeypatch):
    """A fast peer's next call hides this one: in some of the interleavings."""
    found = [find_fault(monkeypatch, "one set", False, seed) for seed in range(12)]
    assert any("AssertionError: time-outs: [" in text for text in found), found


def test_nothing_is_found_without_a_fault(monkeypatch):
    for two_shot in (False, True):
        for seed in range(3):
            assert find_fault(monkeypatch, "", two_shot, seed) == ""


def test_late_stores_show_in_the_numbers(monkeypatch):
    """Without the release a peer reads what was there before."""
    monkeypatch.setenv("PYPAR_FAULT", "no release")
    module = simt_module("allreduce", "checked")
    wrong = 0
    for seed in range(4):
        x, ys = torch.ones(200), [torch.zeros(200) for _ in range(2)]
        with peer_ranks(module, 2, 800, seed) as ranks:
            for rank in range(2):
                ranks.launch(rank, x, ys[rank], False)
            with pytest.raises(RuntimeError, match="race"):
                ranks.run()
        wrong += any((y != 2).any() for y in ys)
    assert wrong > 0


# ---- a peer that does not come


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("flavour", ["fast", "checked"])
def test_the_time_out_names_the_rank(flavour, absent):
    P = 3
    with peer_ranks(simt_module("allreduce", flavour), P, 4096, 1, timeout_ms=20) as ranks:
        xs = [draw(500, seed=rank) for rank in range(P)]
        ys = [torch.full((500,), 7.0) for _ in range(P)]
        present = [rank for rank in range(P) if rank != absent]
        for call in range(2):  # one that all make, one that a rank misses
            for rank in range(P) if call == 0 else present:
                ranks.launch(rank, xs[rank], ys[rank], False)
        ranks.run()
        for rank in present:
            assert ranks.errors()[rank] == (absent, 2, 0)
            with pytest.raises(
                RuntimeError, match=f"waited for rank {absent} in call 2, which did not bring"
            ):
                ranks.launch(rank, xs[rank], ys[rank], False)
        # The one that comes late finds nobody; and a rank that failed does nothing more.
        ranks.launch(absent, xs[absent], ys[absent], False)
        ranks.run()
        ranks.groups[present[0]]["error"] = ranks.groups[absent]["error"]
    expected = rank_sum(xs)
    assert all(torch.equal(y, expected) for y in ys)  # of the first call; the second wrote nothing


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_group_that_failed_does_nothing_more(two_shot):
    """On the device, whatever the host knows: a peer that comes late does not take one call's input for another's."""
    with peer_ranks(simt_module("allreduce", "fast"), 2, 4096, 1, timeout_ms=20) as ranks:
        first, second, late = (draw(64, seed=seed) for seed in range(3))
        y, late_y = torch.full((64,), 7.0), torch.full((64,), 7.0)
        ranks.launch(0, first, y, two_shot)
        ranks.launch(0, second, y, two_shot)  # queued before the host could know
        ranks.run()
        assert ranks.errors() == [(1, 1, 0), None] and (y == 7).all()
        ranks.launch(1, late, late_y, two_shot)
        ranks.run()
        assert ranks.errors()[1] == ((0, 1, 1) if two_shot else None)
    assert torch.equal(late_y, torch.full((64,), 7.0) if two_shot else first + late)


def test_no_time_out_means_for_ever():
    with (
        peer_ranks(simt_module("allreduce", "fast"), 2, 4096, timeout_ms=0) as ranks,
        pytest.raises(RuntimeError, match="endless wait: .* kernel.cuh:"),
    ):
        ranks.launch(0, draw(64, seed=0), torch.zeros(64), False)
        ranks.run()
