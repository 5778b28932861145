"""Schedules and simulator against the figures of papers and of other programs' lists."""

import time

import pytest

from pypar.pipeline_parallel import schedules, simulate, validate
from pypar.pipeline_parallel.stage_cost import StageCost

# Ranks, microbatches, T_F, T_B, T_W, T_comm in ms, and the bubble rates that the zero-bubble paper prints for 1F1B,
# ZB-H1, ZB-H2, ZB-1p and ZB-2p (arXiv 2401.10241, tables 9 and 5; its B is the input gradient).
ZERO_BUBBLE = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083, 0.1585, 0.0433),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837, 0.1242, 0.0039),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444, 0.0674, 0.0026),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672, 0.1397, 0.0066),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088, 0.0516, 0.1088, 0.0054),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576, 0.0266, 0.0576, 0.0028),
]
# What a weight gradient needs of a layer's activations: 32 sbh of 34 sbh + 5 s^2 a b (the same paper, section 4.2),
# with s = 1024 and 24 heads of 2304 (1.5B), 40 heads of 5120 (14.6B).
KEPT = {8: 32 / (34 + 5 * 1024 * 24 / 2304), 16: 32 / (34 + 5 * 1024 * 40 / 5120)}


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row[0]} ranks, {row[1]} microbatches")
def test_simulator_reproduces_the_published_bubble_rates(row):
    p, m, t_f, t_b, t_w, t_comm, *rates = row
    cost = StageCost(t_f, t_b, t_w)
    for name, rate in zip(("one_f_one_b", "zb_h1", "zb_h2"), rates, strict=False):
        assert round(simulate(schedules.build(name, p, m), cost, t_comm).span_bubble, 4) == rate, name


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow if row[1] >= 64 else ()) for row in ZERO_BUBBLE],
    ids=lambda row: f"{row[0]} ranks, {row[1]} microbatches",
)
def test_search_reaches_the_published_bubble_rates_within_the_memory(row):
    p, m, t_f, t_b, t_w, t_comm, *rates = row
    cost = StageCost(t_f, t_b, t_w, activation_for_weight=KEPT[p])
    for name, rate, memory in (("zb_1p", rates[3], p), ("zb_2p", rates[4], 2 * p)):
        began = time.process_time()
        schedule = schedules.build(name, p, m, costs=cost, communication=t_comm)
        assert time.process_time() - began < 5
        validate(schedule, num_microbatches=m, costs=cost, memory_limit=memory + 1e-9)
        assert round(simulate(schedule, cost, t_comm).span_bubble, 4) <= rate, name


# Name, options, cost of a pair; the makespan of stages with F = I = W = 1 for (4, 8), (4, 16), (8, 32) ranks and
# microbatches; the most that each rank holds for (4, 8), in microbatches of all its layers.
EQUAL = [
    ("gpipe", {}, None, (33, 57, 117), [8, 8, 8, 8]),
    ("one_f_one_b", {}, None, (33, 57, 117), [4, 3, 2, 1]),
    ("interleaved", {"stages_per_rank": 2}, None, (57, 105, 213), [5.5, 4.5, 3.5, 2.5]),
    ("interleaved", {"stages_per_rank": 4}, None, (105, 201, 405), [4.75, 4.25, 3.75, 3.25]),
    ("breadth_first", {"stages_per_rank": 2}, None, (57, 105, 213), [8, 8, 8, 8]),
    ("breadth_first", {"stages_per_rank": 4}, None, (105, 201, 405), [8, 8, 8, 8]),
    ("zb_h1", {}, None, (27, 51, 103), [4, 4, 4, 4]),
    ("zb_h1", {"stages_per_rank": 2}, None, (51, 99, 199), [4, 4, 4, 4]),
    ("zb_h2", {}, None, (27, 51, 103), [7, 7, 7, 7]),
    ("zb_v", {}, None, (51, 99, 199), [4, 4, 4, 4]),
    ("dualpipe_v", {}, 3, (54, 102, 206), [4.5, 4.5, 4.5, 4.5]),
    ("dualpipe_v", {}, 2, (44, 76, 152), [4.5, 4.5, 4.5, 4.5]),
    ("dualpipe", {}, 3, (26, 50, 102), [5, 5, 5, 5]),
]


@pytest.mark.parametrize(("name", "options", "pair", "makespans", "peaks"), EQUAL)
def test_makespan_and_memory_with_equal_parts(name, options, pair, makespans, peaks):
    for (p, m), makespan in zip(((4, 8), (4, 16), (8, 32)), makespans, strict=True):
        schedule = schedules.build(name, p, m, **options)
        result = simulate(schedule, StageCost(pair=pair))
        assert result.makespan == makespan
        if (p, m) == (4, 8):
            assert [peak / schedule.stages_per_rank for peak in result.peak_in_flight] == peaks
    if name in ("zb_h2", "zb_v"):
        assert result.span_bubble == 0


def test_peaks_on_eight_ranks():
    falling = {"interleaved": [11.5 - r for r in range(8)], "one_f_one_b": [8 - r for r in range(8)]}
    for name, peaks in (*falling.items(), ("zb_h1", [8] * 8), ("zb_h2", [15] * 8), ("dualpipe_v", [8.5] * 8)):
        schedule = schedules.build(name, 8, 32)
        assert [peak / schedule.stages_per_rank for peak in simulate(schedule).peak_in_flight] == peaks
    looped = schedules.build("interleaved", 8, 32, stages_per_rank=4)
    assert [peak / 4 for peak in simulate(looped).peak_in_flight] == [9.75 - r / 2 for r in range(8)]


# The idle time within a span, in a rank's layers, for F : I : W, on 4 ranks with 8 microbatches and 8 with 32.
UNEQUAL = [
    ("one_f_one_b", (90, 84, 210, 196)),
    ("zb_h1", (36, 48, 84, 112)),
    ("v_half", (32, 44, 100, 124)),
    ("v_min", (79.5, 119, 234, 396)),
]


@pytest.mark.parametrize(("name", "idle"), UNEQUAL)
def test_idle_time_with_unequal_parts(name, idle):
    cases = [(p, m, parts) for p, m in ((4, 8), (8, 32)) for parts in ((10, 11, 9), (10, 12, 6))]
    for (p, m, parts), expected in zip(cases, idle, strict=True):
        schedule = schedules.build(name, p, m)
        result = simulate(schedule, StageCost(*parts).shared(schedule.stages_per_rank))
        assert result.span - m * sum(parts) == pytest.approx(expected)


# Of lists that other programs search for: the idle time is reached with so many times the memory of 1F1B. ZB-2p counts
# half of the activations from I to W, ZB-V all.
SEARCHED = [
    ("zb_2p", 2.25, 0.5, (6, 24, 7, 8)),
    ("zb_2p", 2.0, 0.5, (6, 24, 7, 12)),
    ("zb_v", 1.125, None, (4, 15, 12.5, 39)),
    ("zb_v", 1.0, None, (4, 15, 14, 39)),
]


@pytest.mark.parametrize(("name", "memory", "kept", "idle"), SEARCHED)
def test_idle_time_of_what_is_searched_for(name, memory, kept, idle):
    cases = [(p, m, parts) for p, m in ((4, 8), (8, 32)) for parts in ((10, 11, 9), (10, 12, 6))]
    for (p, m, parts), expected in zip(cases, idle, strict=True):
        cost = StageCost(*parts, activation_for_weight=kept).shared(schedules.find(name).stages_per_rank)
        result = simulate(schedules.build(name, p, m, costs=cost, memory=memory), cost)
        assert result.span - m * sum(parts) <= expected + 1e-6
        assert max(result.peak_memory) <= memory * p + 1e-6


def test_v_min_is_slower_than_1f1b_where_the_parts_differ():
    for p, m in ((4, 8), (8, 32)):
        cost = StageCost(10, 12, 6)
        v_min = simulate(schedules.build("v_min", p, m), cost.shared(2))
        assert v_min.span > simulate(schedules.build("one_f_one_b", p, m), cost).span


# Ranks, and peak memory and idle time of V-Half and V-Min, with three microbatches a rank and F = I = W.
CONTROLLABLE = [
    (4, 3, 2.5, 2, 5.5),
    (5, 3, 5.5, 3, 7.5),
    (6, 4, 5.5, 3, 8.5),
    (8, 5, 8.5, 4, 13.5),
    (12, 7, 14.5, 5, 20.5),
    (16, 9, 20.5, 6, 29.5),
]


@pytest.mark.parametrize(("p", "half", "idle_half", "least", "idle_least"), CONTROLLABLE)
def test_v_half_and_v_min(p, half, idle_half, least, idle_least):
    for name, peak, idle in (("v_half", half, idle_half), ("v_min", least, idle_least)):
        result = simulate(schedules.build(name, p, 3 * p))
        assert max(result.peak_in_flight) / 2 == peak
        assert (result.span - 18 * p) / 2 == idle
    assert (half, least) == ((p + 2) // 2, (p + 4) // 3)


@pytest.mark.parametrize("depth", [2, 4, 6, 8])
def test_chimera_has_the_published_bubble(depth):
    """arXiv 2107.06925 with as many microbatches as stages; one long backward, and one as long as a forward."""
    schedule = schedules.build("chimera", depth, depth)
    for backward, work in ((1, 2 * depth), (2, 3 * depth / 2)):
        result = simulate(schedule, StageCost(1, backward / 2, backward / 2))
        assert result.makespan_bubble == pytest.approx((depth - 2) / (work + depth - 2))
    assert min(result.peak_in_flight) == depth // 2 + 1 and max(result.peak_in_flight) == depth


@pytest.mark.parametrize("p", [4, 8])
def test_dualpipe_has_the_published_idle_time(p):
    """(p/2-1)(O+B-3W), on each rank at most, for pairs as long as F and B, and of two thirds of that."""
    for pair in (3, 2):
        result = simulate(schedules.build("dualpipe", p, 4 * p), StageCost(pair=pair))
        rows = zip(result.start, result.end, result.busy, strict=True)
        idle = max(ends[-1] - starts[0] - busy for starts, ends, busy in rows)
        assert idle <= (p / 2 - 1) * (pair + 2 - 3)
        assert pair == 2 or idle == (p / 2 - 1) * 2


def test_segments_shorten_the_idle_time_of_1f1b():
    """Seq1F1B (arXiv 2406.03488): k segments leave 1/k of it, and each rank p-r+k-1 segments of 1/k microbatch."""
    p, m, k = 4, 8, 4
    schedule = schedules.build("seq1f1b", p, m, num_segments=k)
    result = simulate(schedule, StageCost(1 / k, 1 / k, 1 / k))
    assert result.makespan - 3 * m == pytest.approx(3 * (p - 1) / k)
    assert result.peak_in_flight == [p - rank + k - 1 for rank in range(p)]
