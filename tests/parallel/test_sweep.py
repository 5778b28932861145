"""pypar.parallelize on every causal language model of transformers: cut and right, or refused by a sentence."""

import importlib.util
import re

import pytest
import torch

import pypar
from pypar.layout import layout_of, local_part, local_tensor
from pypar.mesh import Mesh

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def outcome(kind, num_key_value_heads, mesh):
    """One word and what there is to say: cut, refused, left out, WRONG or CRASH."""
    from tests.harness.transformers_sweep import NotTinyError, tiny_model, token_ids

    try:
        model = tiny_model(kind, num_key_value_heads)
        expected = results(model, token_ids())
    except NotTinyError as reason:
        return f"left out: {reason}"
    before = {name: id(p) for name, p in model.named_parameters()}
    try:
        pypar.parallelize(model, mesh)
    except ValueError as error:
        whole = {name: id(p) for name, p in model.named_parameters()} == before
        return f"refused: {error}" if whole else f"WRONG: changed by a refusal, {error}"
    except Exception as error:
        return f"CRASH in parallelize: {type(error).__name__}: {error}"
    try:
        logits, gradients = results(model, token_ids())
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}"
    errors = {"logits": relative(logits, expected[0])}
    parameters = dict(model.named_parameters())
    largest = max(x.abs().max().item() for x in expected[1].values())
    for name, whole in expected[1].items():
        part = local_part(whole, layout_of(parameters[name]), mesh)
        errors[name] = relative(local_tensor(gradients[name]), part, 1e-3 * largest)
    wrong = {name: f"{error:.1g}" for name, error in errors.items() if not error < 1e-3}
    num_cut = sum(bool(layout_of(p).cuts) for p in parameters.values())
    return f"WRONG: {wrong}" if wrong else f"cut: {num_cut} of {len(before)} parameters"


def results(model, ids):
    logits = model(input_ids=ids).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    (logits * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def relative(actual, expected, floor=0.0):
    return ((actual - expected).abs().max() / (expected.abs().max() + floor + 1e-30)).item()


def run_kinds(kinds, num_key_value_heads):
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    mesh = Mesh(tp=2)
    return {kind: outcome(kind, num_key_value_heads, mesh) for kind in kinds}


# Kinds of attention and feed-forward that names alone get wrong or refuse; the others are in the long sweep.
FEW = {
    "olmo2": "cut",  # norms over all heads: q, k, v gathered
    "opt": "cut",  # fc1, fc2 beside self_attn
    "gemma": "cut",  # a scaled embedding stays whole
    "phi3": "cut",  # fused q, k, v
    "deepseek_v2": "cut",  # latent attention, experts
    "gpt_oss": "cut",  # sinks, experts
    "apertus": "cut",  # learned scalars between column and row
    "stablelm": "refused",  # a list of norms, one a head
    "diffllama": "refused",  # pairs of heads
}


@needs_transformers
def test_a_few_kinds_are_cut_right_or_refused(ranks):
    for outcomes in ranks(2, run_kinds, list(FEW), 4, timeout_s=300):
        assert {kind: text.partition(":")[0] for kind, text in outcomes.items()} == FEW, table(outcomes)


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_every_causal_language_model_is_cut_right_or_refused(ranks, num_key_value_heads):
    from tests.harness.transformers_sweep import KINDS

    outcomes = {}
    for i in range(0, len(KINDS), 10):
        group = KINDS[i : i + 10]
        for answer in ranks(2, run_kinds, group, num_key_value_heads, timeout_s=600):
            for kind, text in answer.items():
                if text.partition(":")[0] != outcomes.get(kind, text).partition(":")[0]:
                    text = f"WRONG: ranks differ: {text} || {outcomes[kind]}"
                outcomes[kind] = text
    words = [text.split(":")[0].split()[0] for text in outcomes.values()]
    bad = [kind for kind, text in outcomes.items() if text.startswith(("WRONG", "CRASH"))]
    assert not bad, f"{bad}\n{table(outcomes)}"
    # A maker that no longer makes models, or a parallelize that refuses them, must not pass.
    assert words.count("cut") >= 100 and words.count("left") < 30, table(outcomes)
    for kind, text in outcomes.items():
        if text.startswith("refused"):
            assert re.search(r"[Gg]ive a plan|plan=|use a tp size|whole|use \d+", text), f"{kind}: {text}"


def table(outcomes):
    return "\n".join(f"{kind:28s} {text[:200]}" for kind, text in sorted(outcomes.items()))
