"""`pypar.plan_activations`: the same bits, and at most what the plan says, to the byte."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import pypar
from pypar.mesh import Mesh, parse_mesh
from pypar.models import Decoder, DecoderConfig
from pypar.pipeline_parallel.split_backward import SplitBackward
from pypar.recomputation.parts import part_of
from pypar.recomputation.plan import trace
from tests.recomputation.test_recompute import WIDTH, Model, assert_same, numbers, outcome, seeded
from tests.recomputation.test_written import InPlace, Layers, Reused
from tests.recomputation.test_written import outcome as outcome_of_layers

SIZES = DecoderConfig(256, 4, 32, 4, 2, 8, 88)
TOKENS = torch.arange(2 * 33).view(2, 33) % 256
KEPT = 509_952  # bytes of four such layers, all kept


def step(model, num_in_flight=1, order=None, tokens=TOKENS):
    """(losses, gradients) of microbatches whose forwards come before their backwards."""
    model.zero_grad()
    losses = [model(tokens[:, :-1] + i, targets=tokens[:, 1:]) for i in range(num_in_flight)]
    for i in order or range(num_in_flight):
        losses[i].backward()
    return [loss.detach() for loss in losses] + [p.grad.clone() for p in model.parameters()]


def check(planner):
    assert planner.plan is not None
    assert planner.measured_bytes == planner.plan.peak_bytes <= planner.budget_bytes
    assert planner.offload.host_peak <= max(planner.plan.host_bytes, 1 << 18)
    gc.collect()
    assert planner.offload.host_now == 0


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.75, 1.0])
def test_a_decoder_holds_what_the_plan_says(share, offload):
    plain, model = (seeded(lambda: Decoder(SIZES)) for _ in range(2))
    expected, table = step(plain), []
    planner = pypar.plan_activations(
        model, int(share * KEPT), min_bytes=1, offload=offload, report=table.append
    )
    for _ in range(3):
        assert_same(step(model), expected)
    check(planner)
    assert planner.plan.table == tuple(table) and f"{planner.plan.peak_bytes:,}" in table[0]
    if share == 1.0:
        assert planner.plan.added_s == 0 and planner.plan.peak_bytes == KEPT and not planner.plan.host_bytes


@pytest.mark.parametrize("order", [(0, 1, 2), pytest.param((2, 1, 0), marks=pytest.mark.slow)], ids=str)
@pytest.mark.filterwarnings(
    "ignore:blocks held"
)  # what is kept for one leaves no room for more, until it is over
def test_several_microbatches_in_flight(order):
    plain, model = (seeded(lambda: Decoder(SIZES)) for _ in range(2))
    planner = pypar.plan_activations(model, KEPT, min_bytes=1)
    for _ in range(2):
        assert_same(step(model), step(plain))
        check(planner) if planner.plan else None
    for _ in range(3):  # more in flight than were watched: a step is watched again
        assert_same(step(model, 3, order), step(plain, 3, order))
    assert planner.plan.num_in_flight == 3
    check(planner)


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_operators_dropout_and_other_shapes(autocast):
    model = seeded(Model)
    planner = pypar.plan_activations(model, 40_000, min_bytes=1)
    for batch in (2, 2, 3, 3, 2, 3):
        x = numbers(batch, 6, WIDTH)
        assert_same(outcome(model, x.clone(), autocast), outcome(seeded(Model), x.clone(), autocast))
        model.zero_grad()
    check(planner)
    assert len(planner._plans) == 2


@pytest.mark.parametrize(
    "layer", [InPlace, Reused, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())]
)
@pytest.mark.parametrize("budget", [2500, 5000, 20_000])
def test_results_that_are_written_into_and_memory_that_blocks_share(layer, budget):
    x = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH).requires_grad_()
    model, plain = (seeded(lambda: Layers(layer)) for _ in range(2))
    planner = pypar.plan_activations(model, budget, min_bytes=1)
    for _ in range(3):
        for each in (model, plain):
            each.zero_grad()
        assert_same(outcome_of_layers(model, x), outcome_of_layers(plain, x))
    assert planner.measured_bytes <= planner.plan.peak_bytes <= budget
    gc.collect()
    assert planner.offload.host_now == 0


def test_a_backward_in_two_parts():
    model, plain = seeded(Model), seeded(Model)
    planner = pypar.plan_activations(model, 40_000, min_bytes=1)
    for _ in range(3):
        results = []
        for each in (model, plain):
            x = numbers(2, 6, WIDTH).requires_grad_()
            torch.manual_seed(7)
            backward = SplitBackward(each(x), [x])
            (gradient,) = backward.input_gradients()
            backward.weight_gradients()
            results.append([gradient, *(p.grad for p in each.parameters())])
        assert_same(*results)
    check(planner)


def test_a_graph_that_is_dropped_or_fails_is_watched_again():
    model = seeded(Model)
    planner = pypar.plan_activations(model, 40_000, min_bytes=1)
    model(numbers(2, 6, WIDTH))
    hook = model.layers[1].norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(model)
    hook.remove()
    for _ in range(3):
        model.zero_grad()
        assert_same(outcome(model), outcome(seeded(Model)))
    check(planner)


def test_copies_and_pickles_make_plans_of_their_own():
    model = seeded(Model)
    planner = pypar.plan_activations(model, "40kB", min_bytes=1)
    expected = outcome(copy.deepcopy(model))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same(outcome(again), expected)
    other = part_of(again.layers[0]).planner
    assert other is not planner and other.budget_bytes == 40_000


def test_a_budget_that_no_choice_meets_is_refused_with_the_least_that_one_does():
    model = seeded(lambda: Decoder(SIZES))
    pypar.plan_activations(model, 1000, min_bytes=1)
    step(model)
    with pytest.raises(
        ValueError, match=r"of these 4 blocks need at least ([\d,]+) bytes, 1 of each"
    ) as refused:
        step(model)
    least = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    model = seeded(lambda: Decoder(SIZES))
    planner = pypar.plan_activations(model, least, min_bytes=1)
    step(model), step(model)
    check(planner)


@pytest.mark.parametrize(
    ("budget", "options", "sentence"),
    [
        ("2 apples", {}, "'2 apples' is no number of bytes; write a number and one of B, KB, KiB"),
        (None, {}, "None is no number of bytes"),
        (True, {}, "True is no number of bytes"),
        (0, {}, r"the budget of activations \(0\) must be at least 1 byte"),
        ("1GB", {"axis": "tp"}, r"axis \('tp'\) must be an axis of a mesh"),
        ("1GB", {"report": True}, r"report \(True\) must be a function of a line"),
    ],
)
def test_refusals(budget, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pypar.plan_activations(Model(), budget, **options)


def one_of_two():
    """On one of two ranks that are watched at different speeds: its choices."""
    mesh = Mesh.of(parse_mesh("tp=2"))
    model = seeded(lambda: Decoder(SIZES))
    planner = pypar.plan_activations(model, int(0.5 * KEPT), min_bytes=1, offload=False, axis=mesh.tp)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if mesh.rank:  # whose clock says something else
            monkeypatch.setattr(trace.Clock, "seconds", lambda _, start, end: 1.0 + hash((start, end)) % 97)
        for _ in range(2):
            step(model)
    check(planner)
    return [sorted(rule.calls.items()) for rule in planner.plan.rules.values()]


def test_ranks_that_communicate_inside_blocks_choose_the_same(ranks):
    a, b = ranks(2, one_of_two)
    assert a == b
