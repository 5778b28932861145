"""pypar.apply_fused: an unmodified model of transformers computes the same with pypar's operators."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import pypar
from pypar.layout import layout_of, local_part, local_tensor
from pypar.mesh import Mesh
from tests.harness.samples import relative
from tests.harness.transformers_sweep import tiny_model, token_ids

# What is swapped: norms, rotary embeddings, gated activations. Two layers each, but six where layers differ.
FAMILIES = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "gemma2": (9, 2, 2),
    "gemma3_text": (37, 6, 6),
    "phi3": (5, 2, 2),
    "gpt_oss": (5, 2, 2),
    "mixtral": (5, 2, 2),
    "olmo2": (9, 2, 2),
}
PARTS = ("norm", "rotary embedding", "gated activation", "loss", "last layer")


def _labels(ids):
    labels = ids.clone()
    labels[0, :5] = -100
    return labels


def _loss_and_gradients(model, **more):
    ids = token_ids()
    model.zero_grad()
    out = model(input_ids=ids, **{"labels": _labels(ids), **more})
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


def _assert_same(actual, expected, tolerance=1e-5):
    """Tiny gradients are sums of large terms: they may also lose what the rule of accuracy lets gradients lose."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        largest, lost = gradient.abs().max(), ((gradient + 0.3) - 0.3 - gradient).abs().max()
        assert (actual[name] - gradient).abs().max() <= tolerance * largest + 2 * lost, name


def _pair(kind, **changes):
    """(a model in training mode, the same one fused, the report)."""
    plain = tiny_model(kind, 2, **changes).train()
    fused = copy.deepcopy(plain)
    return plain, fused, pypar.apply_fused(fused)


def _counts(lines):
    return {part: sum(len(line.names) for line in lines if line.part == part) for part in PARTS}


@pytest.mark.parametrize("kind", FAMILIES)
def test_values_and_gradients_are_those_of_the_model_as_it_was(kind):
    plain, fused, report = _pair(kind)
    assert _counts(report.swapped) == dict(zip(PARTS, (*FAMILIES[kind], 1, 1), strict=True)), str(report)
    for more in ({}, {"num_items_in_batch": torch.tensor(30)}):
        expected, gradients = _loss_and_gradients(plain, **more)
        out, actual = _loss_and_gradients(fused, **more)
        assert out.logits is None and out.loss.dtype == torch.float32
        assert abs(out.loss.item() - expected.loss.item()) < 1e-5 * expected.loss.item()
        _assert_same(actual, gradients)
    position_ids = torch.stack([torch.arange(12), torch.arange(12) + 3])  # tables of each sequence
    logits = [model.eval()(token_ids(), position_ids=position_ids).logits for model in (plain, fused)]
    assert relative(logits[1], logits[0]) < 1e-5


def test_bf16_errs_no_more_than_before():
    exact, _ = _loss_and_gradients(tiny_model("qwen3", 2).eval())
    plain, fused, _ = _pair("qwen3")
    plain, fused = plain.bfloat16(), fused.bfloat16()
    expected, gradients = _loss_and_gradients(plain.eval())
    out, _ = _loss_and_gradients(fused.eval())
    assert out.logits.dtype == torch.bfloat16
    allowed = 2 * (expected.logits - exact.logits).abs().max()
    assert (out.logits - exact.logits).abs().max() <= allowed
    loss, actual = _loss_and_gradients(fused.train())
    assert loss.logits is None and abs(loss.loss - exact.loss) <= 2 * abs(expected.loss - exact.loss) + 1e-3
    for name, gradient in gradients.items():
        assert actual[name].dtype == gradient.dtype == torch.bfloat16
        assert relative(actual[name], gradient) < 0.1, name


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_autocast_gives_the_same_types(kind):
    plain, fused, _ = _pair(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (model.eval()(token_ids()).logits for model in (plain, fused))
        losses = [_loss_and_gradients(model.train())[0].loss for model in (plain, fused)]
    assert actual.dtype == expected.dtype and relative(actual, expected) < 0.05
    assert losses[0].dtype == losses[1].dtype and abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_only_this_model_changes():
    before = modeling_llama.apply_rotary_pos_emb
    plain, fused, _ = _pair("llama")
    assert modeling_llama.apply_rotary_pos_emb is before
    assert (
        type(plain.model.norm) is type(plain.model.layers[0].input_layernorm) is modeling_llama.LlamaRMSNorm
    )
    assert isinstance(fused.model.norm, modeling_llama.LlamaRMSNorm)
    assert repr(fused) == repr(plain)
    assert [*fused.state_dict()] == [*plain.state_dict()]


def test_a_second_call_finds_what_the_first_one_did():
    _, fused, first = _pair("llama")
    classes = [type(module) for module in fused.modules()]
    second = pypar.apply_fused(fused)
    assert not second.swapped and _counts(second.before) == _counts(first.swapped)
    assert [type(module) for module in fused.modules()] == classes
    assert "2 x rotary embedding of LlamaAttention" in str(first) and "pypar.rope" in str(first)
    assert "since an earlier call" in str(second)


def test_copies_pickles_and_saved_files(tmp_path):
    plain, fused, _ = _pair("qwen3")
    expected, gradients = _loss_and_gradients(plain)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        out, actual = _loss_and_gradients(again)
        assert out.logits is None
        _assert_same(actual, gradients)
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_recomputed_layers():
    plain, fused, _ = _pair("llama")
    _, gradients = _loss_and_gradients(plain)
    fused.gradient_checkpointing_enable()
    _assert_same(_loss_and_gradients(fused)[1], gradients)


def test_arguments_of_the_loss():
    plain, fused, _ = _pair("mixtral")
    ids = token_ids()
    targets = torch.roll(_labels(ids), 1)
    for more in (
        {"shift_labels": targets},
        {"ignore_index": 7, "labels": torch.where(_labels(ids) < 0, 7, ids)},
        {"output_router_logits": True},
        {"num_items_in_batch": 5, "output_hidden_states": True},
    ):
        expected, gradients = _loss_and_gradients(plain, **more)
        out, actual = _loss_and_gradients(fused, **more)
        assert out.logits is None and abs(out.loss - expected.loss) < 1e-5 * expected.loss
        assert (out.aux_loss is None) == (expected.aux_loss is None)
        assert (out.hidden_states is None) == (expected.hidden_states is None)
        _assert_same(actual, gradients)
    as_tuple = fused(input_ids=ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].dim() == 0
    positional = fused(ids, None, None, None, None, ids)
    assert positional.logits is None and torch.equal(positional.loss, as_tuple[0])


def test_logits_are_there_whenever_they_may_be_wanted():
    plain, fused, _ = _pair("llama")
    ids = token_ids()
    assert fused(input_ids=ids).logits is not None
    assert fused.eval()(input_ids=ids, labels=ids).logits is not None
    fused.train().loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    assert fused(input_ids=ids, labels=ids).logits is not None
    report = pypar.apply_fused(plain, loss=False)
    assert _counts(report.swapped)["loss"] == 0 and type(plain.lm_head) is nn.Linear
    assert plain(input_ids=ids, labels=ids).logits is not None


def test_a_new_last_layer_is_said_and_taken_by_another_call():
    _, fused, _ = _pair("llama")
    fused.resize_token_embeddings(131)
    with pytest.warns(
        UserWarning,
        match="logits: its lm_head is a Linear, which gives no loss; call pypar.apply_fused again",
    ):
        assert _loss_and_gradients(fused)[0].logits is not None
    report = pypar.apply_fused(fused)
    assert [line.part for line in report.swapped] == ["last layer"]
    assert _loss_and_gradients(fused)[0].logits is None


def test_meta_models_are_swapped_before_they_have_numbers():
    whole = tiny_model("llama")
    with torch.device("meta"):
        model = type(whole)(whole.config)
        report = pypar.apply_fused(model)
    assert _counts(report.swapped) == dict(zip(PARTS, (5, 2, 2, 1, 1), strict=True)), str(report)


# ---- with others


def run_over_ranks(order):
    """The largest relative errors of this rank's loss and gradients."""
    mesh, plain = Mesh(tp=2), tiny_model("qwen3", 2).train()
    expected, gradients = _loss_and_gradients(plain)
    model = tiny_model("qwen3", 2).train()
    for step in order:
        pypar.apply_fused(model) if step == "fused" else pypar.parallelize(model, mesh)
    out, actual = _loss_and_gradients(model)
    assert out.logits is None and layout_of(model.lm_head.weight).cuts
    errors = {"loss": abs(out.loss.item() - expected.loss.item()) / expected.loss.item()}
    for name, parameter in model.named_parameters():
        part = local_part(gradients[name], layout_of(parameter), mesh)
        scale = max(gradients[name].abs().max().item(), 1e-3)
        errors[name] = (local_tensor(actual[name]) - part).abs().max().item() / scale
    return errors


@pytest.mark.parametrize("order", [("fused", "parallel"), ("parallel", "fused")], ids=["before", "after"])
def test_before_and_after_parallelize(ranks, order):
    for errors in ranks(2, run_over_ranks, order):
        assert max(errors.values()) < 1e-5, {name: e for name, e in errors.items() if e >= 1e-5}


@pytest.mark.slow  # torch.compile alone is a minute's import on a busy machine
def test_compiled():
    plain, fused, _ = _pair("llama")
    seen = set()

    def backend(graph, _):
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    expected, gradients = _loss_and_gradients(plain)
    out, actual = _loss_and_gradients(torch.compile(fused, backend=backend, fullgraph=True))
    assert out.logits is None and abs(out.loss - expected.loss) < 1e-5 * expected.loss
    _assert_same({name.removeprefix("_orig_mod."): each for name, each in actual.items()}, gradients)
    operators = ("rms_norm_forward", "rope_forward", "gated_forward", "linear_cross_entropy")
    assert all(any(operator in target for target in seen) for operator in operators), seen
