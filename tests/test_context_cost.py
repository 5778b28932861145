"""The method "auto": what each method is expected to take, and the choice."""

import math
from dataclasses import replace

import pytest
import torch
from context_cases import CASES, Case, assert_close, inputs, many_ranks, one_device

from pypar.comm import Traffic
from pypar.context_parallel import measure_costs, method_costs
from pypar.context_parallel.agreement import agreement_bytes
from pypar.context_parallel.cost import cheapest, explained
from pypar.context_parallel.layouts import segments_of
from pypar.context_parallel.machine_costs import MachineCosts, costs_of
from pypar.context_parallel.masks import Mask
from pypar.context_parallel.volume import Sizes
from pypar.mesh import Axis

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
    return costs


def test_measured_costs_are_the_same_on_every_rank(ranks):
    first, second = ranks(2, _measure)
    assert first == second and first.near == 2
    for value in (
        first.flops_per_s,
        first.call_s,
        first.bytes_per_s,
        first.latency_s,
        first.near_bytes_per_s,
    ):
        assert 0 < value < 1e15


def test_one_rank_can_be_measured():
    axis = Axis("cp", None, 0, 1, (0,), Traffic("cp"))
    assert measure_costs(axis).flops_per_s > 0
