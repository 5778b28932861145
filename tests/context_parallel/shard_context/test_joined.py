"""transformers' models under `pypar.shard_context` that join positions elsewhere than in attention are refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import pypar
from tests.context_parallel.shard_context.transformers_cases import DECODER, LENGTH, model_from, tokens
from tests.harness.simulated_ranks import run_ranks

LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def _call(axis, models, options):
    with pypar.shard_context(axis) as context, torch.no_grad():
        part = context.shard(tokens()[:, :-1], 1)
        axis.traffic.reset()
        try:
            positions = context.positions(LENGTH)[None]
            out = models[axis.rank](input_ids=part, position_ids=positions, use_cache=False, **options)
        except ValueError as error:
            return str(error), dict(axis.traffic.calls)
        return context.unshard(out[0], 1), None


def _on_two_ranks(model, **options):
    return run_ranks(2, _call, [copy.deepcopy(model) for _ in range(2)], options)


def assert_refused(model, sentence, **options):
    """By both ranks, and before they exchange anything but the refusal."""
    for told, calls in _on_two_ranks(model, **options):
        assert isinstance(told, str) and sentence in told, told
        assert set(calls) == {"all_gather"}


def assert_right(model):
    with torch.no_grad():
        expected = model(input_ids=tokens()[:, :-1], use_cache=False)[0]
    for out, _ in _on_two_ranks(model):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def _rope(parameters):
    config = LlamaConfig(**DECODER | {"max_position_embeddings": 64}, rope_parameters=parameters)
    return model_from(config, "pypar").eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_last_position(kind):
    parameters = {
        "rope_theta": 10000.0,
        "factor": 4.0,
        **(LONG if kind == "longrope" else {"rope_type": kind}),
    }
    # The whole has 20 positions: within the trained length no rank scales, beyond it each would by its own last one.
    assert_right(_rope(parameters | {"original_max_position_embeddings": LENGTH}))
    assert_refused(
        _rope(parameters | {"original_max_position_embeddings": LENGTH - 1}),
        f'rope_type "{kind}", which depends on the last position from {LENGTH - 1} on, of LlamaForCausalLM would take',
    )


def test_positions_that_a_model_swallows_among_others():
    config = BartConfig(
        vocab_size=32, d_model=16, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=24
    )
    config._attn_implementation = "pypar"
    assert_refused(BartForCausalLM(config).eval(), "BartDecoder takes no position_ids")


def test_layers_whose_type_the_configuration_names():
    config = Lfm2Config(**DECODER, layer_types=["full_attention", "conv"])
    assert_refused(
        model_from(config, "pypar").eval(), 'a layer of the type "conv" of Lfm2ForCausalLM would take'
    )


class _Config(PreTrainedConfig):
    model_type = "a stranger"


class TokenShift(nn.Module):
    def forward(self, x):
        return x + torch.roll(x, 1, 1)


class Counting(nn.Module):
    def forward(self, x):
        return x + torch.arange(x.shape[1], device=x.device)[:, None]


class Given(nn.Module):
    def forward(self, x, position_ids=None):
        return x + (torch.arange(x.shape[1]) if position_ids is None else position_ids)[..., None]


class Decaying(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + x.cumsum(1) * self.A_log.exp()


class _Convolving(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, size, padding="same")

    def forward(self, x):
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


class _Stepping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


class Stranger(PreTrainedModel):
    """A model of transformers that no list of families has."""

    config_class = _Config
    _supports_sdpa = True

    def __init__(self, part):
        super().__init__(_Config(attn_implementation="sdpa"))
        self.embedding = nn.Embedding(32, 4)
        self.part = part

    def forward(self, input_ids, position_ids=None, **_):
        hidden = self.embedding(input_ids)
        return (self.part(hidden, position_ids) if isinstance(self.part, Given) else self.part(hidden),)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (_Convolving(3), "part.convolution (Conv1d), a convolution over positions, of Stranger would take"),
        (_Stepping(), "part.layer (GRU), which goes from position to position,"),
        (TokenShift(), "part (TokenShift), which goes from position to position,"),
        (Decaying(), "part (Decaying), a state that goes from position to position,"),
        (Counting(), "part (Counting), which counts positions itself,"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_join_positions(part, sentence):
    assert_refused(Stranger(part).eval(), sentence)


@pytest.mark.parametrize(
    "part", [_Convolving(1), Given()], ids=["a convolution of one position", "given positions"]
)
def test_modules_that_join_none(part):
    assert_right(Stranger(part).eval())


def test_a_head_that_reads_one_position():
    config = LlamaConfig(**DECODER, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="pypar").eval()
    assert_refused(
        model, "the head, which reads one position of the sequence, of LlamaForSequenceClassification"
    )


def test_a_loss_of_routers():
    config = MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1)
    model = model_from(config, "pypar").eval()
    assert_right(model)
    assert_refused(model, "auxiliary loss of MixtralForCausalLM's routers", output_router_logits=True)
    model.config.output_router_logits = True
    assert_refused(model, "auxiliary loss of MixtralForCausalLM's routers")
