"""Schedules beside each other, the choice of the fastest, and `pipeline.schedule = "auto"`."""

import math

import pytest

from pypar.pipeline_parallel import schedules, simulate
from pypar.pipeline_parallel.compare import RankCost, choose, compared, estimate, table
from pypar.pipeline_parallel.config import PipelineConfig
from pypar.pipeline_parallel.stage_cost import StageCost
from pypar.settings import Run

COST = "F=18.522,I=18.086,W=9.337,comm=0.601"  # of the zero-bubble paper's 1.5B model


def _run(pp=4, num_layers=8, num_microbatches=8):
    return Run({"pp": pp}, num_layers, 4, 16, [16], num_microbatches)


def test_costs_are_of_a_rank_and_shared_among_its_stages():
    cost = RankCost.parse("F=4,I=6,W=2,comm=0.5,kept=0.25")
    assert cost == RankCost(StageCost(4, 6, 2, activation_for_weight=0.25), 0.5)
    found = estimate("interleaved", 4, 8, cost, {"stages_per_rank": 2})
    of_stage = StageCost(2, 3, 1, activation=0.5, activation_for_weight=0.125)
    assert found.simulation == simulate(schedules.build("interleaved", 4, 8), of_stage, 0.5)
    assert found.peak_in_flight == [5.5, 4.5, 3.5, 2.5]
    segments = estimate("seq1f1b", 4, 8, cost, {"num_segments": 4})
    assert segments.simulation.busy == pytest.approx([8 * 12] * 4) and segments.facts["microbatches"] == 8
    whole = estimate("one_f_one_b", 2, 3, RankCost.parse("F=1,B=5")).simulation
    assert whole.busy == [18, 18]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("G=1", "cost 'G' is not one of F, I, W, B, pair, recompute, U, kept, comm"),
        ("com=1", "did you mean 'comm'"),
        ("F=fast", "cost 'F=fast' must be a number from 0 to 1e+12, such as F=0.5"),
        ("W=-1", "cost 'W=-1' must be a number"),
        ("I=nan", "must be a number"),
    ],
)
def test_costs_that_say_nothing_are_refused(text, sentence):
    with pytest.raises(ValueError) as refused:
        RankCost.parse(text)
    assert sentence in str(refused.value)


def test_recomputation_takes_time_and_memory_once():
    """Recomputed in I and kept for W: a split backward pays for it once, as a whole one."""
    cost = StageCost(1, 2, 1, activation=1, recompute=1, recomputed=4)
    for name in ("one_f_one_b", "zb_h1"):
        assert simulate(schedules.build(name, 2, 6), cost).busy == [6 * 5] * 2
    assert simulate(schedules.build("one_f_one_b", 2, 6), cost).peak_memory == [2 + 4, 1 + 4]
    late = simulate(schedules.build("zb_h1", 2, 6), cost).peak_memory
    assert late == [2 + 4, 2 + 4 + 4]  # rank 1 is one weight gradient late: what it recomputed waits, too


def test_all_are_compared_and_what_does_not_exist_says_why():
    found = {each.name: each for each in compared(3, 7, RankCost())}
    assert list(found) == schedules.names()
    illegal = [each for each in found.values() if not each.is_legal]
    assert {each.name for each in illegal} == {"chimera", "dualpipe"}
    assert all("must be even" in each.facts["fault"] for each in illegal)
    lines = table(list(found.values())).splitlines()
    assert (
        len(lines) == 1 + len(found) and " ".join(lines[1].split()) == "gpipe yes 27 22.22% 22.22% 7 7 1x yes"
    )


def test_the_fastest_that_fits_is_chosen_with_the_reason():
    cost = RankCost.parse(COST)
    best, why = choose(8, 24, cost)
    assert best.name == "zb_v" and why.startswith(
        "zb_v is the fastest of 12 that fit, with 1189 a step and 8 "
    )
    assert "no run can have: chimera, dualpipe, seq1f1b, pipedream, pipedream_2bw" in why
    best, why = choose(4, 8, cost, most_stages=4)
    assert best.name == "zb_2p" and "have more stages than 4: interleaved" in why
    best, why = choose(4, 8, cost, memory=3)
    assert best.name == "v_half" and "hold more than 3: gpipe, one_f_one_b" in why
    with pytest.raises(ValueError, match="no pipeline schedule fits .*hold more than 0.5.*allow more memory"):
        choose(4, 8, cost, memory=0.5)


def test_auto_is_replaced_by_what_is_chosen():
    chosen, (why,) = PipelineConfig(schedule="auto", costs=COST).chosen(_run())
    assert chosen.schedule == "zb_v" and why.startswith("pipeline.schedule: zb_v is the fastest")
    assert chosen.build(4, 8).num_stages == 8
    # A run holds until W all that a picture halves at I.
    for memory in (2.0, 3.0):
        config = PipelineConfig(schedule="auto", costs=COST, memory=memory)
        found, _ = config.chosen(_run(pp=2, num_layers=2))
        cost = StageCost(18.522, 18.086, 9.337)
        schedule = found.build(2, 8)
        assert max(simulate(schedule, cost).peak_memory) <= memory
    for config, sentence in (
        (PipelineConfig(schedule="auto"), "needs pipeline.costs"),
        (PipelineConfig(schedule="auto", costs=COST, options="stages_per_rank=2"), "are of one schedule"),
    ):
        with pytest.raises(ValueError, match=sentence):
            config.chosen(_run())
    with pytest.raises(ValueError, match="is chosen before a run starts"):
        PipelineConfig(schedule="auto", costs=COST).build(4, 8)
    named = PipelineConfig(schedule="gpipe")
    assert named.chosen(_run()) == (named, ())


def test_a_run_does_not_count_on_pairs():
    """The runtime runs the two of a pair one after the other, whatever they would take as one."""
    fast_pairs = PipelineConfig(schedule="auto", costs="F=1,I=1,W=1,pair=0.1")
    assert fast_pairs.chosen(_run())[0].schedule != "dualpipe_v"
    assert choose(4, 8, RankCost.parse("F=1,I=1,W=1,pair=0.1"))[0].name == "dualpipe_v"


def test_no_limit_is_infinite():
    assert choose(2, 4, RankCost(), memory=math.inf)[0] == choose(2, 4, RankCost())[0]
