"""pypar.parallelize on unmodified models of Hugging Face transformers."""

import importlib.util

import pytest
import torch
from samples import relative

import pypar
from pypar.layout import Layout, layout_of, local_part, local_tensor
from pypar.mesh import Mesh
from pypar.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "pad_token_id": 3},
    "Mistral": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Phi": {"num_key_value_heads": 2},
}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def hugging_face_model(family, tied, **changes):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **FAMILIES.get(family, {}), "tie_word_embeddings": tied, **changes}
    )
    torch.manual_seed(0)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def loss_and_gradients(model):
    ids = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.loss.item(), out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_hugging_face(world_size, family, tied):
    """This rank's losses, and the largest relative error of a gradient against the whole model's."""
    mesh = Mesh(tp=world_size)
    loss, logits, expected = loss_and_gradients(hugging_face_model(family, tied))
    model = hugging_face_model(family, tied)
    assert pypar.parallelize(model, mesh) is model
    actual_loss, actual_logits, gradients = loss_and_gradients(model)
    assert list(gradients) == list(expected)
    errors = {"loss": abs(actual_loss - loss) / loss, "logits": relative(actual_logits, logits)}
    for name, parameter in model.named_parameters():
        part = local_part(expected[name], layout_of(parameter), mesh)
        scale = expected[name].abs().max().item()
        errors[name] = (local_tensor(gradients[name]) - part).abs().max().item() / max(scale, 1e-3)
    num_cut = sum(bool(layout_of(p).shards) for p in model.parameters())
    return (
        errors,
        num_cut,
        sum(local_tensor(p).numel() for p in model.parameters()) / sum(g.numel() for g in expected.values()),
    )


@needs_transformers
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_keep_loss_and_gradients(ranks, family, tied):
    for errors, num_cut, share in ranks(2, run_hugging_face, 2, family, tied):
        assert max(errors.values()) < 1e-5, {name: e for name, e in errors.items() if e >= 1e-5}
        assert num_cut >= 12
        assert share < 0.6


@needs_transformers
def test_one_rank_needs_no_process_group():
    errors, num_cut, _ = run_hugging_face(1, "Llama", True)
    assert not any(errors.values()) and not num_cut


def run_tied():
    model = pypar.parallelize(hugging_face_model("Llama", True), Mesh(tp=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, ColumnParallelLinear) and model.lm_head.gather_output
    assert isinstance(model.model.embed_tokens, VocabParallelEmbedding)
    layer = model.model.layers[0]
    return [
        layout_of(p) for p in (model.lm_head.weight, layer.self_attn.o_proj.bias, layer.mlp.down_proj.weight)
    ]


@needs_transformers
def test_tied_weights_stay_one_parameter(ranks):
    for layouts in ranks(2, run_tied):
        assert layouts == [Layout((48, 32), (("tp", 0),)), Layout((32,)), Layout((32, 56), (("tp", 1),))]


def run_generation():
    ids = torch.tensor([[5, 11, 7], [1, 2, 40]])
    tokens = []
    for model in (
        hugging_face_model("Llama", True),
        pypar.parallelize(hugging_face_model("Llama", True), Mesh(tp=2)),
    ):
        tokens.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=3).tolist())
    return tokens


@needs_transformers
def test_generation_with_its_cache_works(ranks):
    for expected, actual in ranks(2, run_generation):
        assert actual == expected and len(actual[0]) == 9


def run_recomputed():
    grads = []
    for recompute in (False, True):
        model = pypar.parallelize(hugging_face_model("Llama", False), Mesh(tp=2)).train()
        if recompute:
            model.gradient_checkpointing_enable()
        grads.append(loss_and_gradients(model)[2])
    return all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@needs_transformers
def test_activation_checkpointing_changes_nothing(ranks):
    assert all(ranks(2, run_recomputed))


HUGGING_FACE_REFUSALS = {
    "Llama": ({"num_key_value_heads": 1}, "num_key_value_heads (1) of model.layers.0.self_attn must divide"),
    "Gemma": ({"num_key_value_heads": 2, "head_dim": 8}, "ScaledWordEmbedding, which may compute more"),
    "Phi3": ({"num_key_value_heads": 2, "pad_token_id": 0}, "does not know qkv_proj"),
    "Olmo2": (
        {"num_key_value_heads": 2, "pad_token_id": 0},
        "does not know model.layers.0.self_attn.k_norm.weight (16,)",
    ),
    "GPT2": ({"n_embd": 32, "n_head": 4, "n_layer": 1}, "knows no nn.Linear"),
}


def run_refused_hugging_face(family):
    model = hugging_face_model(family, True, **HUGGING_FACE_REFUSALS[family][0])
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, Mesh(tp=2))
    return str(caught.value)


@needs_transformers
@pytest.mark.parametrize("family", HUGGING_FACE_REFUSALS)
def test_models_that_the_usual_plan_would_get_wrong_are_refused(ranks, family):
    for message in ranks(2, run_refused_hugging_face, family):
        assert HUGGING_FACE_REFUSALS[family][1] in message
