"""pypar.parallelize on unmodified models of Hugging Face transformers."""

import importlib.util

import pytest
import torch

import pypar
from pypar.layout import Cut, Layout, layout_of, local_part, local_tensor
from pypar.mesh import Mesh
from pypar.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from tests.harness.samples import relative

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
    num_cut = sum(bool(layout_of(p).cuts) for p in model.parameters())
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
        assert layouts == [
            Layout((48, 32), (Cut(0, "tp"),)),
            Layout((32,)),
            Layout((32, 56), (Cut(1, "tp"),)),
        ]


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
    "StableLm": ({"qk_layernorm": True, "num_key_value_heads": 4}, "its outputs differ by"),
    "DiffLlama": ({"num_key_value_heads": 4}, "first in model.layers.0.self_attn (allowed 0.001)"),
    "BitNet": ({"num_key_value_heads": 2}, "does not run: in model.layers.0.self_attn.attn_sub_norm"),
    "GPT2": ({"n_embd": 32, "n_head": 4, "n_layer": 1}, "knows no nn.Linear"),
}


def run_refused_hugging_face(family):
    model = hugging_face_model(family, True, **HUGGING_FACE_REFUSALS[family][0])
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, Mesh(tp=2))
    message = str(caught.value)
    if family in ("StableLm", "DiffLlama"):  # what the sentence advises works
        advised = eval(message.partition("plan=")[2], {"pypar": pypar, "model": model})
        pypar.parallelize(model, Mesh(tp=2), advised)
        assert layout_of(model.model.layers[0].mlp.up_proj.weight).cuts
        assert not layout_of(model.model.layers[0].self_attn.q_proj.weight).cuts
    return message


@needs_transformers
@pytest.mark.parametrize("family", HUGGING_FACE_REFUSALS)
def test_models_that_the_usual_plan_would_get_wrong_are_refused(ranks, family):
    for message in ranks(2, run_refused_hugging_face, family):
        assert HUGGING_FACE_REFUSALS[family][1] in message


# ---- plans that transformers ships, and plans that start from what is known


def run_plans():
    """Loss and gradients hold for each plan; returns the number of warnings of each and the plan of the model."""
    import warnings

    from pypar.parallel import USUAL_PLAN, plan_of

    mesh, expected = Mesh(tp=2), loss_and_gradients(hugging_face_model("Qwen3", False))
    plans = {
        "the user's": {"*.mlp.*": "whole", **USUAL_PLAN},
        "of the model": {"*.embed_tokens": "whole", **plan_of(hugging_face_model("Qwen3", False))},
        "of the first releases": None,
    }
    said = []
    for name, plan in plans.items():
        model = hugging_face_model("Qwen3", False)
        if name == "of the first releases":  # transformers 4.48 to 4.5x: no embedding, no norms, other names
            layers = ("q_proj", "k_proj", "v_proj")
            model._tp_plan = {"lm_head": "colwise_rep"}
            model.model._tp_plan = {
                **{f"layers.*.self_attn.{name}": "colwise" for name in layers},
                "layers.*.self_attn.o_proj": "rowwise",
                "embed_tokens": "rowwise_rep",
            }
            model.config.base_model_tp_plan = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pypar.parallelize(model, mesh, plan)
        said.append([str(w.message) for w in caught])
        loss, _, gradients = loss_and_gradients(model)
        assert abs(loss - expected[0]) < 1e-5, name
        for key, parameter in model.named_parameters():
            part = local_part(expected[2][key], layout_of(parameter), mesh)
            assert (local_tensor(gradients[key]) - part).abs().max() < 1e-5 * expected[2][
                key
            ].abs().max() + 1e-6, (
                name,
                key,
            )
        layer = model.model.layers[0]
        assert layout_of(layer.self_attn.q_proj.weight).cuts == (Cut(0, "tp"),)
        assert bool(layout_of(layer.mlp.up_proj.weight).cuts) == (name == "of the model")
        assert bool(layout_of(model.model.embed_tokens.weight).cuts) == (name != "of the model")
    return said, plan_of(hugging_face_model("Qwen3", False))


@needs_transformers
def test_plans_that_start_from_the_usual_one_or_from_the_models_own(ranks):
    for said, plan in ranks(2, run_plans):
        assert said == [[], [], []]
        assert plan["model.layers.*.self_attn.q_norm"] == "per_head" and plan["model.embed_tokens"] == "vocab"


def run_unknown_shipped_style():
    model = hugging_face_model("Llama", False)
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp": "all_reduce"}
    with pytest.raises(ValueError) as caught:
        pypar.parallelize(model, Mesh(tp=2))
    return str(caught.value)


@needs_transformers
def test_a_shipped_style_that_pypar_lacks_is_refused(ranks):
    for message in ranks(2, run_unknown_shipped_style):
        assert "gives model.layers.0.mlp the style 'all_reduce', for which pypar has no role" in message


def run_encoder_decoder(kind):
    """A model with an encoder, whose layers have fc1 and fc2 beside their attention, against itself when whole."""
    import transformers

    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             {"layers": 1, "attention_heads": 4, "ffn_dim": 40}.items()}  # fmt: skip
    tokens = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "d_model": 32}
    if kind == "Whisper":
        sizes |= {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, **tokens, decoder_start_token_id=1, dropout=0.0)
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    main = {"input_features": torch.ones(2, 8, 32)} if kind == "Whisper" else {"input_ids": ids}
    name = f"{kind}ForConditionalGeneration" if kind == "Whisper" else f"{kind}MTModel"
    losses = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        if parallel:
            pypar.parallelize(model, Mesh(tp=2))
            layer = model.model.decoder.layers[0]
            for cut in (layer.fc1, layer.fc2, layer.self_attn.q_proj, layer.encoder_attn.out_proj):
                assert layout_of(cut.weight).cuts
        losses.append(model(**main, labels=ids).loss.item())
    return abs(losses[1] - losses[0]) / losses[0]


@needs_transformers
@pytest.mark.parametrize("kind", ["Whisper", "Marian"])
def test_encoder_decoder_models_are_cut(ranks, kind):
    assert max(ranks(2, run_encoder_decoder, kind)) < 1e-5
