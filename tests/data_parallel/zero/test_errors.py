"""Errors in the middle of a forward or a backward leave a model and a store that go on as if nothing had been."""

import contextlib

import pytest
import torch

from tests.data_parallel.zero.programs import Model
from tests.data_parallel.zero.script import assert_same, bytes_of, loss_of, make, update, whole_state
from tests.data_parallel.zero.trees import batch
from tests.harness.pairs import pairwise


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("on purpose")


class Breaks(Model):
    """Fails in the second block where it is told to."""

    fails = ""

    def through(self, layer, x):
        if layer is self.layers[1] and self.fails == "backward":
            x = Fails.apply(x)
        if layer is self.layers[1] and self.fails == "before a block":
            raise ArithmeticError("on purpose")
        x = layer(x)
        if layer is self.layers[1] and self.fails == "in a block's backward":
            x = Fails.apply(x)
        return x


def run_failure(stage, reshard, where, accumulating):
    """The state after three steps, of which one has an error in its middle, or none has."""
    model, store, optimizer, rank = make(stage, model=Breaks, **({"reshard": reshard} if stage == 3 else {}))
    handle = None
    for step in range(3):
        if step == 1 and where:
            if where == "in a block":
                handle = model.layers[1].second.register_forward_pre_hook(lambda *_: 1 / 0)
            else:
                model.fails = where
            context = store.accumulate() if accumulating else contextlib.nullcontext()
            with pytest.raises(ArithmeticError), context:
                loss_of(model, rank, step).backward()
            model.fails = ""
            if handle is not None:
                handle.remove()
            store.zero_grad()
        loss_of(model, rank, step).backward()
        update(store, optimizer)
    return whole_state(store), bytes_of(model.parameters())


PLACES = ("in a block", "before a block", "backward", "in a block's backward")


@pytest.mark.parametrize(
    ("stage_and_reshard", "where", "accumulating"),
    pairwise([(3, True), (3, False), (2, True), (0, True)], PLACES, [False, True]),
)
def test_after_an_error_the_next_forward_starts_clean(ranks, stage_and_reshard, where, accumulating):
    stage, reshard = stage_and_reshard
    expected = ranks(2, run_failure, stage, reshard, "", False)
    for (state, held), (wanted, _) in zip(
        ranks(2, run_failure, stage, reshard, where, accumulating), expected, strict=True
    ):
        assert_same(state, wanted)
        assert stage < 3 or held == 0


def run_error_then_forward_only(where):
    """What an evaluation gives after an error, and what is held then."""
    model, store, _, rank = make(model=Breaks)
    x = batch(rank, 0, 0)[0]
    with torch.no_grad():
        expected = model(x)
    model.fails = where
    with pytest.raises(ArithmeticError):
        loss_of(model, rank).backward()
    model.fails = ""
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with store.gathered():
        assert all(p.untyped_storage().size() for p in model.parameters())
    return bytes_of(model.parameters())


@pytest.mark.parametrize("where", ["before a block", "backward"])
def test_after_an_error_an_evaluation_is_right_and_nothing_stays(ranks, where):
    assert ranks(2, run_error_then_forward_only, where) == [0, 0]
