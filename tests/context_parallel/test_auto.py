"""The method "auto": what each method is expected to take, and the choice."""

import math
from dataclasses import replace

import pytest
import torch

from pypar.comm import Traffic
from pypar.context_parallel import measure_costs, method_costs
from pypar.context_parallel.agreement import agreement_bytes
from pypar.context_parallel.auto.choose import cheapest, explained
from pypar.context_parallel.auto.volume import Sizes
from pypar.context_parallel.layouts import segments_of
from pypar.context_parallel.masks import Mask
from pypar.cost.machine import MachineCosts, costs_of
from pypar.mesh import Axis
from tests.context_parallel.cases import CASES, Case, assert_close, inputs, many_ranks, one_device

FREE = MachineCosts(math.inf, 0.0, math.inf, 0.0, 1, math.inf, 0.0, 0.0, math.inf)
SLOW_LINK = replace(FREE, flops_per_s=1e12, call_s=1e-6, bytes_per_s=1e6, near_bytes_per_s=1e6)
CALLS_COST = replace(FREE, call_s=1.0)
# Attention takes far longer than any transfer, and only what does not hide shows.
HIDES = replace(FREE, flops_per_s=1.5e6, bytes_per_s=1e6, near_bytes_per_s=1e6)


SIZES = Sizes(1, 8, 2, 16, 16, torch.float32)


def table(size, length=64, layout="zigzag", sizes=SIZES, mask=None, costs=HIDES):
    held = tuple(segments_of(length, rank, size, layout) for rank in range(size))
    return method_costs(sizes, held, held, mask or Mask(-1, 0, (0, length), (0, length)), costs)


def by_name(costs):
    return {cost.name: cost for cost in costs}


@pytest.mark.parametrize(
    ("costs", "size", "expected"), [(SLOW_LINK, 4, "ulysses"), (CALLS_COST, 3, "ulysses"), (HIDES, 4, "ring")]
)
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_auto_is_the_method_that_it_chose(costs, size, expected, layout):
    case = Case(B=2, T=48, N=8, G=8)
    given = inputs(case, torch.float32)
    options = {"costs": costs}
    results, sent = many_ranks(case, given, size, layout, method="auto", method_options=options)
    direct, sent_directly = many_ranks(case, given, size, layout, method=expected)
    assert_close(results, one_device(case, given), 1e-5, 1e-4)
    assert sent == sent_directly
    assert all(torch.equal(results[name], direct[name]) for name in results)


@pytest.mark.parametrize("name", ["documents", "everything", "more keys", "no position", "short", "bias"])
def test_auto_takes_every_option(name):
    given = inputs(CASES[name], torch.float32)
    results, _ = many_ranks(CASES[name], given, 3, "zigzag", method="auto")
    assert_close(results, one_device(CASES[name], given), 1e-5, 1e-4)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_bytes_of_the_table_are_those_of_the_busiest_rank(method):
    case = Case(T=37, N=8, G=2, H=8, Hv=8)
    cost = by_name(table(3, 37, "contiguous", Sizes(1, 8, 2, 8, 8, torch.float32)))[method]
    _, sent = many_ranks(case, inputs(case, torch.float32), 3, "contiguous", method=method)
    busiest = [max(each) for each in zip(*sent, strict=True)]
    assert [cost.forward_bytes + agreement_bytes(3), cost.backward_bytes] == busiest


def test_what_cannot_run_is_left_out_with_its_reason():
    few_heads = by_name(table(8, sizes=Sizes(1, 4, 2, 16, 16, torch.float32)))
    assert few_heads["ulysses"].refused == "4 query heads are fewer than 8 ranks"
    assert few_heads["hybrid ulysses_size=4"].refused is None
    striped = by_name(table(8, layout="striped"))
    assert "needs a layout of chunks" in (striped["hybrid ulysses_size=2"].refused or "")
    assert striped["ring"].refused is None and striped["ulysses"].refused is None
    only = cheapest(
        tuple(
            replace(c, refused=c.refused or ("" if c.method != "ring" else None)) for c in striped.values()
        ),
        backward=True,
    )
    assert only.method == "ring"


def test_times_follow_the_mask_and_the_layout():
    ring = {layout: by_name(table(4, layout=layout))["ring"].forward_s for layout in ("zigzag", "contiguous")}
    # The last of 4 ranks has 3.5 blocks of 16 rows of the 8 in all, and a diagonal's half row each.
    assert ring["contiguous"] / ring["zigzag"] == pytest.approx(
        (3 * 16 * 16 + 16 * 17 / 2) / (64 * 65 / 2 / 4)
    )
    window = by_name(table(4, layout="contiguous", mask=Mask(3, 0, (0, 64), (0, 64))))
    assert window["ring"].forward_bytes < window["all_gather"].forward_bytes / 2
    assert window["ring"].forward_s < ring["zigzag"] / 4


# Full attention of 2 ranks with 32 positions each: 8 heads x 32 x 32 pairs x 2 products of 16, at 1e6 a second.
BLOCK_S = 2 * 8 * 32 * 32 * 32 / 1e6
KEYS_BYTES = 32 * 2 * 32 * 4  # of 2 key/value heads, as many as of their gradients
FULL = Mask(-1, -1, (0, 64), (0, 64))
SPEEDS = replace(FREE, flops_per_s=1e6, bytes_per_s=1e6, near_bytes_per_s=1e6)


@pytest.mark.parametrize(
    ("bytes_per_s", "own_share", "forward_s", "backward_s"),
    [
        (1e6, 0.0, 2 * BLOCK_S, 5 * BLOCK_S),  # all hides
        (1e6, 1.0, 2 * BLOCK_S + KEYS_BYTES / 1e6, 5 * BLOCK_S + KEYS_BYTES / 1e6),  # nothing does
        (1e3, 0.0, KEYS_BYTES / 1e3 + BLOCK_S, 2.5 * BLOCK_S + KEYS_BYTES / 1e3),  # longer than what hides it
    ],
)
def test_a_ring_waits_for_what_attention_does_not_hide(bytes_per_s, own_share, forward_s, backward_s):
    costs = replace(SPEEDS, bytes_per_s=bytes_per_s, own_share=own_share)
    ring = by_name(table(2, layout="contiguous", mask=FULL, costs=costs))["ring"]
    assert (ring.forward_s, ring.backward_s) == (pytest.approx(forward_s), pytest.approx(backward_s))


def test_a_long_block_arrives_in_parts():
    # 2 ranks with 1,024 positions of 2 key/value heads, which are 2 parts, on a link that is slower than attention.
    costs = replace(SPEEDS, flops_per_s=1e9, bytes_per_s=1e5)
    mask = Mask(-1, -1, (0, 2048), (0, 2048))
    ring = by_name(table(2, 2048, "contiguous", mask=mask, costs=costs))["ring"]
    part_s, half_s = 32 * KEYS_BYTES / 2 / 1e5, 1024 * 1e6 * BLOCK_S / 2 / 1e9
    assert part_s > 2 * half_s
    assert ring.forward_s == pytest.approx(
        2 * part_s + half_s
    )  # the first part is done when the last one comes
    # Backward sends the sums of a part when it is done, and has its own block done meanwhile.
    assert ring.backward_s == pytest.approx(2.5 * half_s + 2 * part_s)


def test_a_gather_shows_its_first_heads_and_a_scatter_its_last():
    own = by_name(table(2, layout="contiguous", mask=FULL, costs=replace(SPEEDS, own_share=1.0)))[
        "all_gather"
    ]
    hides = by_name(table(2, layout="contiguous", mask=FULL, costs=SPEEDS))["all_gather"]
    heads_s = KEYS_BYTES / 2 / 1e6  # of one of 2 heads
    assert hides.forward_s == pytest.approx(heads_s + 2 * BLOCK_S)
    assert hides.backward_s == pytest.approx(heads_s + 5 * BLOCK_S + heads_s)
    assert own.forward_s == pytest.approx(2 * heads_s + 2 * BLOCK_S)
    assert own.backward_s == pytest.approx(4 * heads_s + 5 * BLOCK_S)


def test_an_all_to_all_shows():
    ulysses = by_name(table(2, layout="contiguous", mask=FULL, costs=SPEEDS))["ulysses"]
    # Half of q, k and v leaves, and of out and lse.
    sent_s = (32 * (8 * 16 + 2 * 32) + 32 * 8 * (16 + 1)) / 2 * 4 / 1e6
    assert ulysses.forward_s == pytest.approx(2 * BLOCK_S + sent_s)
    assert ulysses.backward_s == pytest.approx(5 * BLOCK_S + sent_s)


def test_a_ring_goes_over_its_queries_once_a_hop():
    costs = by_name(table(4, layout="contiguous", mask=FULL, costs=replace(FREE, row_s=1.0)))
    assert costs["ring"].forward_s == 4 * 8 * 16  # 16 queries of 8 heads
    assert costs["all_gather"].forward_s == 8 * 16
    assert costs["ring"].backward_s == 2 * costs["ring"].forward_s


def test_what_was_measured_of_a_method_counts_for_it():
    measured = replace(FREE, methods=(("ring", 3.0, 0.0), ("ulysses", 0.3, 1.0)))
    costs = by_name(table(4, layout="contiguous", mask=FULL, costs=measured))
    assert (costs["ring"].forward_s, costs["ring"].backward_s) == (1.0, 2.0)
    assert costs["all_gather"].forward_s == 0.0
    held = 4 * 16 * (8 * 16 + 2 * 32 + 8 * (16 + 1))  # q, k, v, out and lse
    assert costs["ulysses"].forward_s == pytest.approx(0.1 + 3 * held)
    assert costs["hybrid ulysses_size=2"].backward_s == pytest.approx(0.2 + 6 * held)


@pytest.mark.parametrize(
    ("expected", "costs", "layout", "mask", "groups"),
    [
        ("ring", SLOW_LINK, "contiguous", Mask(7, 0, (0, 256), (0, 256)), 8),  # few keys are sent at all
        ("ulysses", SLOW_LINK, "zigzag", Mask(-1, 0, (0, 256), (0, 256)), 8),  # every key would travel to all
        ("ring", replace(HIDES, bytes_per_s=1e5), "zigzag", Mask(-1, 0, (0, 256), (0, 256)), 1),  # all hides
        (
            "all_gather",
            replace(FREE, row_s=1.0, bytes_per_s=1e9),
            "zigzag",
            Mask(-1, 0, (0, 256), (0, 256)),
            1,
        ),
    ],
)
def test_the_cheapest_where_one_thing_dominates(expected, costs, layout, mask, groups):
    sizes = Sizes(1, 8, groups, 16, 16, torch.float32)
    assert cheapest(table(4, 256, layout, sizes, mask, costs), backward=True).method == expected


def test_near_ranks_are_fast_ones():
    costs = replace(SLOW_LINK, near=4, near_bytes_per_s=1e12)
    assert [costs.speed_of(n) for n in (1, 2, 3, 4, 8)] == [1e12, 1e12, 1e6, 1e12, 1e6]
    # 2 hosts of 4: neither all-to-all between hosts nor a ring of all keys; heads shared inside, a ring outside.
    sizes = Sizes(1, 32, 8, 128, 128, torch.bfloat16)
    choice = cheapest(table(8, 4096, sizes=sizes, costs=costs), backward=True)
    assert choice.name == "hybrid ulysses_size=4"


def test_the_table_is_printed_on_request(capsys):
    given = inputs(CASES["causal"], torch.float32)
    many_ranks(CASES["causal"], given, 3, "zigzag", method="auto", backward=False)
    assert capsys.readouterr().out == ""
    options = {"explain": True, "costs": CALLS_COST}
    many_ranks(CASES["causal"], given, 3, "zigzag", method="auto", method_options=options, backward=False)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["method", "ring", "all_gather", "*"]
    assert "no: " in explained(table(8, layout="striped"), table(8, layout="striped")[0])


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="'auto' has no option 'explian'; it takes explain, costs"):
        many_ranks(
            CASES["causal"],
            inputs(CASES["causal"], torch.float32),
            2,
            "zigzag",
            method="auto",
            method_options={"explian": True},
        )


def _measure():
    axis = Axis.of(torch.distributed.group.WORLD, "cp")
    costs = measure_costs(axis)
    assert measure_costs(axis) is costs and costs_of(axis, torch.device("cpu"), torch.float32) is costs
    assert (
        costs_of(axis, torch.device("cpu"), torch.bfloat16) is costs
    )  # of another dtype, but of these links
    of_bf16 = measure_costs(axis, dtype=torch.bfloat16)
    assert costs_of(axis, torch.device("cpu"), torch.bfloat16) is of_bf16 is not costs
    return costs


def test_measured_costs_are_the_same_on_every_rank(ranks):
    first, second = ranks(2, _measure)
    assert first == second and first.near == 2
    positive = ("flops_per_s", "call_s", "bytes_per_s", "latency_s", "near_bytes_per_s", "copy_bytes_per_s")
    assert all(0 < getattr(first, name) < 1e15 for name in positive)
    assert 0 <= first.own_share <= 1 and 0 <= first.row_s < 1
    assert [name for name, *_ in first.methods] == ["ring", "all_gather", "ulysses"]
    assert all(0 < step_s < 1 and 0 <= byte_s < 1 for _, step_s, byte_s in first.methods)


def test_one_rank_can_be_measured():
    axis = Axis("cp", None, 0, 1, (0,), Traffic("cp"))
    assert measure_costs(axis).flops_per_s > 0
