"""`pypar.zero(offload="chunks")`: the bits of stage 0, a peak that is the placement's, and steps that change."""

import warnings
from contextlib import nullcontext

import pytest
import torch

import pypar
from pypar.arenas import OverBudgetError
from pypar.mesh import Mesh
from tests.data_parallel.zero.training import STAGES, Script, assert_same_bits, train
from tests.data_parallel.zero.trees import HALF, WIDTH, Group, Leaf, Tree, everything
from tests.harness.pairs import pairwise

MEGABYTE = 1 << 20
BLOCKS = [f"layers.{index}" for index in range(6)]
DEEP = Tree(
    tuple(
        Group((Leaf((7, WIDTH)), Leaf((WIDTH, WIDTH)), Leaf((3, WIDTH), is_trained=index != 2)))
        for index in range(6)
    ),
    before=Group((Leaf((5, WIDTH)),)),
    after=Group((Leaf((3, WIDTH)),)),
)
FORMS = STAGES | {
    "2 reduces each": {"stage": 2, "accumulate": "reduce"},
    "3 reduces each": {"stage": 3, "accumulate": "reduce"},
}
SCRIPTS = {
    "one microbatch": Script(num_steps=5),
    "three microbatches": Script(num_microbatches=3, num_steps=4),
    "momentum": Script(num_microbatches=2, optimizer="momentum", num_steps=4),
}


@pytest.mark.parametrize(
    ("world_size", "form", "script", "recompute", "dtype", "bucket_bytes"),
    pairwise((1, 2, 3), FORMS, SCRIPTS, ("no", "inside"), (None, HALF), (60, 300, MEGABYTE)),
)
def test_chunks_have_the_bits_of_the_store_without(
    ranks, world_size, form, script, recompute, dtype, bucket_bytes
):
    tree, sizes = everything(recompute), {"dp": world_size}
    options = FORMS[form] | {"dtype": dtype}
    # Sums of each microbatch have another order than those of stage 0.
    plain = options if "accumulate" in options else {"stage": 0, "dtype": dtype}
    chunked = options | {"offload": "chunks", "device_bytes": 12_000, "bucket_bytes": bucket_bytes}
    expected = ranks(world_size, train, tree, sizes, plain, SCRIPTS[script])
    assert_same_bits(ranks(world_size, train, tree, sizes, chunked, SCRIPTS[script]), expected)


def test_groups_of_ranks_have_the_same_bits(ranks):
    tree, script = everything(), SCRIPTS["three microbatches"]
    expected = ranks(4, train, tree, {"dp": 4}, {"stage": 0}, script)
    for stage in (1, 3):
        options = {
            "stage": stage,
            "shard_size": 2,
            "offload": "chunks",
            "device_bytes": 12_000,
            "bucket_bytes": 200,
        }
        assert_same_bits(ranks(4, train, tree, {"dp": 4}, options, script), expected)


def _stepped(store, model, optimizer, mesh, step, num_microbatches):
    for microbatch in range(num_microbatches):
        is_last = microbatch == num_microbatches - 1
        with nullcontext() if is_last else store.accumulate():
            DEEP.loss(model, mesh.data.rank, step, microbatch).backward()
    store.clip_grad_norm(0.5)
    optimizer.step()
    store.publish()
    store.zero_grad()


def run_within(stage, device_bytes, dtype, num_microbatches, is_held):
    """What the placement says, what steps then took and moved, the bytes of all, and this rank's rows."""
    mesh = Mesh(dp=torch.distributed.get_world_size())
    model = DEEP.model()
    options = {"offload": "chunks", "device_bytes": device_bytes, "bucket_bytes": 128} if device_bytes else {}
    store = pypar.zero(model, mesh, stage=stage, blocks=BLOCKS, dtype=dtype, **options)
    optimizer = torch.optim.AdamW(store.parameters(), lr=0.02)
    if is_held:
        store.holds_states_of(optimizer)
    seen = []
    for step in range(7):
        if step == 4:
            with torch.no_grad():  # an evaluation between steps changes no plan
                DEEP.loss(model, mesh.data.rank, step, 0)
        places = store.places
        if device_bytes:
            places.device.reset_peak()
            before = (places.copies.to_device, places.copies.to_host)
        _stepped(store, model, optimizer, mesh, step, num_microbatches)
        if device_bytes and step >= 4:
            moved = (places.copies.to_device - before[0], places.copies.to_host - before[1])
            seen.append((places.device.peak, *moved))
    rows = {name: p.detach().clone() for name, p in store.named_parameters()}
    if not device_bytes:
        return rows
    placement = places.choice.placement
    planned = (places.peak, placement.to_device, placement.to_host)
    return planned, seen, places.num_plans, places.choice.families, places.lines(), places.host.now, rows


@pytest.mark.parametrize(
    ("stage", "dtype", "num_microbatches", "is_held", "budgets"),
    [
        (3, None, 2, True, (3_300, 3_700, 4_500, 20_000)),
        (3, HALF, 1, True, (2_000, 2_500, 4_000, 20_000)),
        (3, None, 1, False, (2_500, 3_000)),
        (2, HALF, 2, True, (3_700, 6_000, 20_000)),
        (1, None, 1, True, (3_300, 4_500, 20_000)),
    ],
)
def test_peak_and_bytes_are_those_of_the_placement(ranks, stage, dtype, num_microbatches, is_held, budgets):
    plain = ranks(2, run_within, stage, 0, dtype, num_microbatches, False)
    moved, families = [], []
    for device_bytes in budgets:
        results = ranks(2, run_within, stage, device_bytes, dtype, num_microbatches, is_held)
        for (planned, seen, num_plans, _, lines, _, rows), expected in zip(results, plain, strict=True):
            assert num_plans == 1
            assert planned[0] <= device_bytes
            for step in seen:
                assert step == planned, (
                    f"{device_bytes}: steps took and moved {seen}, and planned was {planned}"
                )
            assert str(planned[0]) in lines[-3].replace(",", "")
            assert rows.keys() == expected.keys()
            for name, x in rows.items():
                assert torch.equal(x, expected[name]), name
        assert len({result[0] for result in results}) == 1, "all ranks have one placement"
        moved.append(sum(results[0][0][1:]))
        families.append(results[0][3])
    assert moved == sorted(moved, reverse=True) and moved[-1] < moved[0]
    if is_held:
        assert moved[-1] == 0 and families == sorted(families) and families[-1] > 0


def run_too_little(device_bytes):
    model = DEEP.model()
    pypar.zero(
        model,
        Mesh(dp=2),
        stage=3,
        blocks=BLOCKS,
        offload="chunks",
        device_bytes=device_bytes,
        bucket_bytes=128,
    )
    with pytest.raises(OverBudgetError) as error:
        DEEP.loss(model, 0, 0, 0).backward()
    return str(error.value)


def test_a_budget_too_small_is_refused_on_all_ranks_alike(ranks):
    for device_bytes in (300, 900):
        first, second = ranks(2, run_too_little, device_bytes)
        assert first == second
        assert f"of its budget of {device_bytes:,}" in first and "raise the budget by" in first


def run_another_step():
    """Steps of one microbatch, then of two, then of one again, with a failed backward in between."""
    mesh, models = Mesh(dp=2), [DEEP.model(), DEEP.model()]
    stores = [
        pypar.zero(model, mesh, stage=3, blocks=BLOCKS, **options)
        for model, options in zip(
            models, ({}, {"offload": "chunks", "device_bytes": 8_000, "bucket_bytes": 128}), strict=True
        )
    ]
    optimizers = [torch.optim.AdamW(store.parameters(), lr=0.02) for store in stores]
    stores[1].holds_states_of(optimizers[1])
    plans, told = [], []
    for step, num_microbatches in enumerate((1, 1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1)):
        if step == 6:
            for model, store in zip(models, stores, strict=True):
                with pytest.raises(ZeroDivisionError):
                    _failing_backward(DEEP.loss(model, mesh.data.rank, step, 0), model)
                store.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for model, store, optimizer in zip(models, stores, optimizers, strict=True):
                _stepped(store, model, optimizer, mesh, step, num_microbatches)
        told += [str(each.message) for each in caught if "this step of the store" in str(each.message)]
        plans.append(stores[1].places.num_plans)
        for one, other in zip(*(store.parameters() for store in stores), strict=True):
            assert torch.equal(one, other), f"step {step}"
    assert stores[1].places.device.peak <= 8_000
    return plans, told


def _failing_backward(loss, model):
    def fail(_):
        raise ZeroDivisionError

    handle = model.layers[3].members[0].weight.register_hook(fail)
    try:
        loss.backward()
    finally:
        handle.remove()


def test_another_step_is_as_right_and_is_planned_anew(ranks):
    for plans, told in ranks(2, run_another_step):
        assert plans[3] == 1 and plans[4] == 1 and plans[-1] >= 3
        assert told and "a new placement is made" in told[0]


def run_checkpoint(first, second):
    """States of a store of one form go on in one of another form."""
    mesh, states = Mesh(dp=2), []
    for options in (first, second):
        model = DEEP.model()
        store = pypar.zero(model, mesh, blocks=BLOCKS, **options)
        optimizer = torch.optim.AdamW(store.parameters(), lr=0.02)
        if states:
            store.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        store.holds_states_of(optimizer)
        for step in range(4):
            _stepped(store, model, optimizer, mesh, step, 1)
        states = [store.state_dict(), optimizer.state_dict()]
        with store.gathered():
            assert all(torch.equal(p, states[0][name].to(p.dtype)) for name, p in model.named_parameters())
    return states[0]


def test_states_go_on_from_any_store_to_any_other(ranks):
    chunks = {"stage": 3, "offload": "chunks", "device_bytes": 8_000, "bucket_bytes": 128}
    plain = {"stage": 3}
    expected = ranks(2, run_checkpoint, plain, plain)[0]
    for forms in ((chunks, plain), (plain, chunks), (chunks, chunks)):
        for state in ranks(2, run_checkpoint, *forms):
            assert all(torch.equal(x, expected[name]) for name, x in state.items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"offload": "chunk"}, 'must be "none"'),
        ({"offload": "chunks"}, "give both, or neither"),
        ({"device_bytes": 5}, "give both, or neither"),
        ({"offload": "chunks", "device_bytes": 0}, "must be a positive number"),
    ],
)
def test_options_that_do_not_fit_are_refused(ranks, options, sentence):
    assert sentence in ranks(1, refuse, options)[0]


def refuse(options):
    with pytest.raises(ValueError) as error:
        pypar.zero(DEEP.model(), Mesh(dp=1), **options)
    return str(error.value)
