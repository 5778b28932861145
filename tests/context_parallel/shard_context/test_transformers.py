"""transformers' models under `pypar.shard_context` give what one process gives, with either of two attentions."""

import pytest
import torch

import pypar
from pypar.mesh import Axis
from tests.context_parallel.shard_context.transformers_cases import (
    DECODER,
    LENGTH,
    assert_equal,
    model_from,
    results,
    tokens,
)
from tests.harness.decoders import decoders
from tests.harness.simulated_ranks import run_ranks

CONFIGS = decoders(DECODER, window=6, head_dim=4)


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def model_of(name, implementation):
    return model_from(CONFIGS[name], implementation)


def over(axis, model, layout, mask_of_ones, length=LENGTH, checkpoints=False):
    if checkpoints:
        model.gradient_checkpointing_enable()
        model.train()
    with pypar.shard_context(axis, layout=layout, length=length) as context:
        inputs, targets = (context.shard(x, 1) for x in (tokens()[:, :-1], tokens()[:, 1:]))
        options = {"attention_mask": torch.ones_like(inputs)} if mask_of_ones else {}
        positions = context.positions(length)[None]
        logits, gradients = results(
            model, inputs, targets, position_ids=positions, use_cache=False, **options
        )
        return context.unshard(logits, 1), gradients


def assert_one_process(outcome, name):
    assert_equal(outcome, model_of(name, "eager"))


def _each(axis, models, *options):
    return over(axis, models[axis.rank], *options)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("name", CONFIGS)
def test_our_attention_in_their_models(name, layout):
    outcome = run_ranks(3, _each, [model_of(name, "pypar") for _ in range(3)], layout, False)
    assert_one_process(outcome, name)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_torch_attention_in_their_models(layout):
    assert_one_process(
        run_ranks(2, _each, [model_of("llama", "sdpa") for _ in range(2)], layout, True), "llama"
    )


@pytest.mark.parametrize(("implementation", "mask_of_ones"), [("pypar", False), ("sdpa", True)])
def test_gradient_checkpointing(implementation, mask_of_ones):
    models = [model_of("llama", implementation) for _ in range(2)]
    assert_one_process(run_ranks(2, _each, models, "zigzag", mask_of_ones, LENGTH, True), "llama")


def _real():
    pypar.register_with_transformers()
    return over(Axis.of(torch.distributed.group.WORLD, "cp"), model_of("llama", "pypar"), "zigzag", False)


def test_two_processes(ranks):
    assert_one_process(ranks(2, _real, timeout_s=120), "llama")


def _refused(axis, models, options):
    with pypar.shard_context(axis, check_models="documents" not in options) as context:
        inputs = context.shard(tokens()[:, :-1], 1)
        if options.get("attention_mask") == "padding":
            first = 2 if axis.rank else 0  # one rank knows of padding
            options = {"attention_mask": torch.arange(LENGTH // 2).expand(2, -1) >= first}
        positions = context.positions(LENGTH)[None]
        if options.pop("documents", False):
            positions = positions.clone()
            positions[:, 3:] -= 3
        models[axis.rank](input_ids=inputs, position_ids=positions, use_cache=False, **options)


@pytest.mark.parametrize(
    ("implementation", "options", "sentence"),
    [
        ("pypar", {"attention_mask": "padding"}, "padding over this rank's 10 positions"),
        ("pypar", {"documents": True}, "neither causal, full nor a sliding window"),
        ("sdpa", {}, "attention_mask of ones"),  # transformers takes jumps of the positions for documents
        ("sdpa", {"attention_mask": "padding"}, "a column for each of the whole sequence's 20 keys"),
    ],
)
def test_masks_of_the_rank_are_refused(implementation, options, sentence):
    models = [model_of("llama", implementation) for _ in range(2)]
    failures = [e for e in run_ranks(2, _refused, models, dict(options), outcomes=True) if e is not None]
    assert failures
    for error in failures:
        assert isinstance(error, (ValueError, RuntimeError))
    with pytest.raises(ValueError, match=sentence):
        raise failures[0]
