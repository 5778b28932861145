"""What transformers passes to attention beside its operands is known by name, or refused by name."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BloomConfig, DeepseekV32Config, FalconConfig, LlamaConfig

import pypar
from pypar.hugging_face.attention import attention_forward
from pypar.hugging_face.attention_options import DOCUMENTS, HARMLESS
from tests.hugging_face.test_attention import SIZES, tokens

# Passed by models of transformers 5.23 and refused: keys that a query sees, by number; sinks of each query.
REFUSED = {"indices", "block_indices", "sinks", "output_attentions"}


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def llama(**sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **sizes), attn_implementation="pypar").eval()


def calls_of(name, text):
    """The calls of a function by its bare name, each parsed by itself: whole files take a hundred times as long."""
    for found in re.finditer(rf"(?<![\w.]){name}\(", text):
        for end in (i for i in range(found.end(), len(text)) if text[i] == ")"):
            try:
                yield ast.parse(text[found.start() : end + 1], mode="eval").body
                break
            except SyntaxError:  # a bracket inside
                continue


def test_every_argument_that_a_model_passes_is_known_or_refused():
    known = {*inspect.signature(attention_forward).parameters, *DOCUMENTS, *REFUSED}
    known |= {name for names in HARMLESS.values() for name in names}
    unknown, calls = {}, 0
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in calls_of("attention_interface", path.read_text()):
            calls += 1
            for keyword in call.keywords:
                if keyword.arg is not None and keyword.arg not in known:
                    unknown.setdefault(keyword.arg, path.stem)
    assert calls > 100
    assert not unknown, "read what these mean and put them into attention_options, or refuse them here"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"key_indices": torch.zeros(2, 40, 3)}, r"does not know key_indices \[2, 40, 3\]"),
        ({"blocks": [torch.zeros(3)]}, "does not know blocks="),
        ({"biases": {"left": torch.zeros(3)}}, "does not know biases="),
        ({"score_mod": lambda score: score}, "does not know score_mod=<function"),
        ({"temperature": 0.5}, "does not know temperature=0.5"),
        ({"cache": object()}, "no paged cache"),
    ],
)
def test_an_unknown_argument_is_refused_by_name(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        llama()(tokens(), **option)


def test_known_arguments_change_nothing():
    model = llama()
    expected = model(tokens()).logits
    options = {"num_items_in_batch": torch.tensor(5), "output_hidden_states": True, "foo": None, "bar": False}
    assert torch.equal(model(tokens(), **options).logits, expected)


def _packed(position_ids):
    ends = torch.tensor([0, 11, 28, 40], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(3), ends.diff())[None]
    inputs = {"input_ids": tokens(1), "use_cache": False}
    if position_ids:
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in ends.diff().tolist()])[None]
    return inputs, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, {"seq_idx": index}


@pytest.mark.parametrize("sliding_window", [None, 8])
def test_documents_are_those_of_the_positions(sliding_window):
    model = llama()
    if sliding_window:
        config = transformers.MistralConfig(**SIZES, sliding_window=sliding_window)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="pypar").eval()
    inputs, *named = _packed(position_ids=True)
    expected = model(**inputs).logits
    for documents in named:
        assert torch.equal(model(**inputs, **documents).logits, expected)
    inputs, *named = _packed(position_ids=False)
    for documents in named:
        with pytest.raises(ValueError, match="takes documents from position_ids that begin at 0"):
            model(**inputs, **documents)
        with pytest.raises(ValueError, match="takes documents from position_ids that begin at 0"):
            model(**inputs, **documents, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
    one = {"cu_seq_lens_q": torch.tensor([0, 40]), "cu_seq_lens_k": torch.tensor([0, 40]), "max_length_q": 40}
    assert torch.equal(model(**inputs, **one).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "config", [BloomConfig(hidden_size=32, n_layer=1, n_head=4), FalconConfig(num_hidden_layers=1)]
)
def test_a_model_that_computes_attention_itself_is_refused_when_it_is_made(config):
    with torch.device("meta"), pytest.raises(ValueError, match="computes attention itself"):
        AutoModelForCausalLM.from_config(config, attn_implementation="pypar")
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_attention_over_chosen_keys_is_refused():
    """DeepSeek-V3.2's indexer gives them as numbers of keys to all attention but "eager" and "sdpa"."""
    config = DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        index_topk=3,
        index_n_heads=2,
        index_head_dim=16,
        mlp_layer_types=["dense"],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pypar").eval()
    with pytest.raises(ValueError, match=r"does not know indices \[2, 14, 3\]"):
        model(tokens(length=14), use_cache=False)


def test_dropout_is_for_training():
    module = torch.nn.Module().eval()
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    without, _ = attention_forward(module, q, k, v, None)
    assert torch.equal(attention_forward(module, q, k, v, None, dropout=0.5)[0], without)
    assert not torch.equal(attention_forward(module.train(), q, k, v, None, dropout=0.5)[0], without)
