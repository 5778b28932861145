"""Every causal language model of transformers with pypar's attention, whole and over ranks: right, or refused."""

import copy
import re

import pytest
import torch

import pypar
from tests.harness.simulated_ranks import run_ranks
from tests.harness.transformers_sweep import KINDS, NotTinyError, tiny_model, token_ids

LENGTH = 16
# One of each sort in `make test`, with what attention and shard_context make of it: windows and softcaps, learned
# positions, sinks and experts, latent heads, sparse attention, a hybrid, no position_ids, attention of its own.
SOME = {
    "gemma2": ("right", "right"),
    "gpt2": ("right", "right"),
    "gpt_oss": ("right", "right"),
    "deepseek_v3": ("right", "right"),
    "deepseek_v32": ("refused", "refused"),
    "jamba": ("right", "refused"),
    "bart": ("right", "refused"),
    "bloom": ("refused", "refused"),
}


def _kinds(place):
    """Names with the expected verdict: None, either, for those that `make test` leaves out."""
    rest = (pytest.param(kind, None, marks=pytest.mark.slow) for kind in KINDS if kind not in SOME)
    return [*((kind, verdicts[place]) for kind, verdicts in SOME.items()), *rest]


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def _tiny(kind, num_key_value_heads=2):
    """(tiny model, what it gives with "eager"); with fewer key/value heads where the family has such."""
    try:
        model = tiny_model(kind, num_key_value_heads)
        return model, _results(_with(model, "eager"), token_ids(LENGTH))
    except NotTinyError as reason:
        pytest.skip(f"no tiny model of {kind}: {reason}")
    except RuntimeError as error:
        if num_key_value_heads == 4:
            pytest.skip(f'"eager" itself does not run {kind} in fp64: {error}')
        return _tiny(kind, 4)


def _with(model, implementation):
    """The same model with another attention, in fp64; experts in a loop, as grouped products know no fp64."""
    made = type(model)._from_config(
        copy.deepcopy(model.config), attn_implementation=implementation, experts_implementation="eager"
    )
    made.load_state_dict(model.state_dict())
    return made.double().eval()


def _weights(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5), dtype=like.dtype)


def _results(model, inputs, weights=None, **options):
    logits = model(input_ids=inputs, use_cache=False, **options).logits
    (logits * (_weights(logits) if weights is None else weights)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def _assert_same(outcome, expected):
    """fp64, but that some models compute norms, routers or positions in fp32."""
    torch.testing.assert_close(outcome[0], expected[0], rtol=1e-4, atol=1e-5 * expected[0].abs().max().item())
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    assert outcome[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(outcome[1][name], gradient, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize(("kind", "verdict"), _kinds(0))
def test_attention_is_that_of_eager_or_refused(kind, verdict):
    model, expected = _tiny(kind)
    try:
        outcome = _results(_with(model, "pypar"), token_ids(LENGTH))
    except ValueError as refusal:
        assert 'attn_implementation="pypar"' in str(refusal)
        assert verdict != "right", refusal
        return
    assert verdict != "refused"
    _assert_same(outcome, expected)


def _of_rank(axis, models, weights, first):
    with pypar.shard_context(axis) as context:
        part = context.shard(token_ids(LENGTH), 1)
        options = {"position_ids": context.positions(LENGTH)[None] + first}
        if models[axis.rank].config._attn_implementation != "pypar":
            options["attention_mask"] = torch.ones_like(part)  # else transformers takes jumps for documents
        logits, gradients = _results(models[axis.rank], part, context.shard(weights, 1), **options)
        return context.unshard(logits, 1), gradients


def _on_two_ranks(model, implementation, weights, first=0):
    ranks = [_with(model, implementation) for _ in range(2)]
    outcomes = run_ranks(2, _of_rank, ranks, weights, first, outcomes=True)
    shift = re.search(r"pass position_ids=.* \+ (\d+)", str(outcomes[0]))
    if first == 0 and shift:  # RoBERTa's relatives, as the refusal says
        return _on_two_ranks(model, implementation, weights, int(shift[1]))
    return outcomes


@pytest.mark.parametrize(("kind", "verdict"), _kinds(1))
def test_two_ranks_are_as_one_or_refuse(kind, verdict):
    model, expected = _tiny(kind)
    try:
        implementation = "pypar"
        _with(model, implementation)
    except ValueError:
        implementation = model.config._attn_implementation  # "sdpa", or "eager" where the family has no other
    outcomes = _on_two_ranks(model, implementation, _weights(expected[0]))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if refusals:
        for refusal in refusals:
            assert isinstance(refusal, ValueError), refusal
        assert len(refusals) == 2 and verdict != "right", refusals
        return
    assert verdict != "refused"
    gradients = {name: sum(o[1][name] for o in outcomes if name in o[1]) for name in expected[1]}
    for logits, _ in outcomes:
        _assert_same((logits, gradients), expected)
