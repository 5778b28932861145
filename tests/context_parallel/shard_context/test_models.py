"""transformers' models under `pypar.shard_context` whose positions or attention would be a rank's alone are refused."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    RobertaConfig,
    RobertaModel,
)

import pypar
from tests.context_parallel.shard_context.transformers_cases import (
    DECODER,
    LENGTH,
    SIZES,
    assert_equal,
    model_from,
    results,
    tokens,
)
from tests.harness.simulated_ranks import run_ranks

GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": lambda: LlamaConfig(**DECODER),
    "qwen2 with a window in one layer": lambda: Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gpt2": lambda: GPT2Config(**GPT2, **NO_DROPOUT),
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    pypar.register_with_transformers()


def model_of(name, implementation):
    return model_from(CONFIGS[name](), implementation)


def _over(axis, models, compiled):
    model = models[axis.rank]
    with pypar.shard_context(axis) as context:
        inputs, targets = (context.shard(x, 1) for x in (tokens()[:, :-1], tokens()[:, 1:]))
        logits, gradients = results(
            torch.compile(model, backend="eager") if compiled else model,
            inputs,
            targets,
            position_ids=context.positions(LENGTH)[None],
            use_cache=False,
        )
        return context.unshard(logits, 1), gradients


def assert_one_process(outcome, name):
    assert_equal(outcome, model_of(name, "eager"))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_families(name):
    assert_one_process(run_ranks(2, _over, [model_of(name, "pypar") for _ in range(2)], False), name)


def _real():
    pypar.register_with_transformers()
    axis = pypar.mesh.Axis.of(torch.distributed.new_group(backend="pypar"), "cp")
    return _over(axis, [model_of("llama", "pypar")] * 2, True)


@pytest.mark.slow  # 40 s: each of the model's functions is a graph
def test_a_compiled_model(ranks):
    assert_one_process(ranks(2, _real, timeout_s=120), "llama")


def _roberta():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(**SIZES, pad_token_id=1, attn_implementation="sdpa")
        return RobertaModel(config, add_pooling_layer=False).eval()


def _hidden(axis, models, shift):
    with pypar.shard_context(axis) as context, torch.no_grad():
        inputs = context.shard(tokens()[:, :-1], 1)
        positions = context.positions(LENGTH)[None] + shift
        options = {"attention_mask": torch.ones(2, 1, LENGTH // 2, LENGTH)}
        return context.unshard(models[axis.rank](inputs, position_ids=positions, **options)[0], 1)


def test_a_model_whose_first_position_is_not_0():
    models = [_roberta() for _ in range(2)]
    with torch.no_grad():
        expected = _roberta()(tokens()[:, :-1])[0]
    for hidden in run_ranks(2, _hidden, models, 2):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    for error in run_ranks(2, _hidden, models, 0, outcomes=True):
        with pytest.raises(ValueError, match=r"pass position_ids=context.positions\(length\)\[None\] \+ 2"):
            raise error


# ---- refusals

POSITIONS = {
    "none": lambda rank, own: None,
    "from 0": lambda rank, own: torch.arange(LENGTH // 2)[None],
    "of one rank from 0": lambda rank, own: own - own[:, :1] if rank else own,
    "shifted on one rank": lambda rank, own: own + rank,
}


def _call(axis, models, layout, positions, options):
    with pypar.shard_context(axis, layout=layout) as context:
        inputs = context.shard(tokens()[:, :-1], 1)
        position_ids = POSITIONS[positions](axis.rank, context.positions(LENGTH)[None])
        models[axis.rank](input_ids=inputs, position_ids=position_ids, use_cache=False, **options)


@pytest.mark.parametrize(
    ("positions", "layout", "sentence"),
    [
        (
            "none",
            "contiguous",
            "LlamaForCausalLM without position_ids counts every rank's positions from 0; pass",
        ),
        ("from 0", "zigzag", r"are \[0, 1, 2, .* rank . of axis .* holds the positions \[|rank 0 of axis"),
        (
            "from 0",
            "contiguous",
            r"position_ids less the positions of the rank must be the same.*rank 1 has -10",
        ),
        ("shifted on one rank", "zigzag", "position_ids less the positions of the rank must be the same"),
    ],
)
@pytest.mark.parametrize("implementation", ["pypar", "sdpa"])
def test_positions_that_are_not_the_ranks_are_refused_on_every_rank(
    implementation, positions, layout, sentence
):
    models = [model_of("llama", implementation) for _ in range(2)]
    for error in run_ranks(2, _call, models, layout, positions, {}, outcomes=True):
        with pytest.raises(ValueError, match=sentence):
            raise error


def _shifted(axis, models):
    with pypar.shard_context(axis) as context, torch.no_grad():
        inputs, positions = context.shard(tokens()[:, :-1], 1), context.positions(LENGTH)[None] + 7
        return context.unshard(models[axis.rank](input_ids=inputs, position_ids=positions).logits, 1)


def test_a_shift_of_the_whole_sequence_is_the_callers():
    model = model_of("llama", "pypar")
    with torch.no_grad():
        expected = model(input_ids=tokens()[:, :-1]).logits  # rotary: a shift changes nothing
    model.config.use_cache = False
    for logits in run_ranks(2, _shifted, [model, model]):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def _labels(axis, models, _):
    with pypar.shard_context(axis) as context:
        inputs, positions = context.shard(tokens()[:, :-1], 1), context.positions(LENGTH)[None]
        models[axis.rank](input_ids=inputs, position_ids=positions, labels=inputs)


def _without_positions(axis, models, checked):
    with pypar.shard_context(axis, check_models=checked), torch.no_grad():
        models[axis.rank](tokens()[:, : LENGTH // 2])


def _with_positions(axis, models, _):
    with pypar.shard_context(axis) as context:
        inputs = context.shard(tokens()[:, :-1], 1)
        models[axis.rank](input_ids=inputs, position_ids=context.positions(LENGTH)[None], use_cache=False)


def _bart():
    return BartModel(BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1)).eval()


def _flash():
    model = model_of("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"  # its package is not there
    return model


@pytest.mark.parametrize(
    ("make", "call", "sentence"),
    [
        (
            lambda: model_of("llama", "eager"),
            _with_positions,
            'attn_implementation="eager" of LlamaModel would',
        ),
        (_flash, _with_positions, 'attn_implementation="flash_attention_2" of LlamaModel would'),
        (_bart, _without_positions, "BartModel takes no position_ids"),
        (lambda: model_of("llama", "sdpa"), _labels, "labels of LlamaForCausalLM are moved by one position"),
    ],
)
def test_models_that_would_go_by_the_ranks_part_are_refused(make, call, sentence):
    models = [make() for _ in range(2)]
    for error in run_ranks(2, call, models, True, outcomes=True):
        with pytest.raises(ValueError, match=sentence):
            raise error


def test_check_models_takes_a_model_as_it_is():
    run_ranks(2, _without_positions, [model_of("gpt2", "pypar") for _ in range(2)], False)


def test_outside_the_block_nothing_is_looked_at():
    model = model_of("llama", "eager")
    with pypar.shard_context(pypar.mesh.Axis.single("cp")):
        expected = model(tokens()).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)
