"""The decoder against Hugging Face's Llama, and against itself with a cache."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pypar.hugging_face.weights import global_name, load_llama_weights
from pypar.models import Decoder, DecoderConfig
from pypar.models.cache import KeyValueCache
from pypar.ops import cross_entropy

SIZES = dict(vocab_size=97, num_layers=3, d_model=48, num_heads=6, num_kv_heads=2, head_size=8, d_ff=80)


def _llama(tied: bool):
    transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_hugging_face(tied: bool) -> None:
    theirs = _llama(tied)
    ours = Decoder(DecoderConfig(**SIZES, tied_embeddings=tied))
    state = {name: w for name, w in theirs.state_dict().items() if not (tied and name.startswith("lm_head"))}
    load_llama_weights(ours, state)
    tokens = torch.randint(97, (2, 65))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    their_logits = theirs(inputs).logits
    our_logits = ours(inputs)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-5, atol=1e-5)
    torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    cross_entropy(our_logits, targets).mean().backward()
    gradients = {global_name(name): w.grad for name, w in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


class Shapes(TorchDispatchMode):
    """The shapes of what operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_targets_is_that_of_the_logits_without_them(tied: bool) -> None:
    """The head's loss beside cross_entropy's, as numbers and by the memory of which the logits are the most."""
    model = Decoder(DecoderConfig(**SIZES, tied_embeddings=tied))
    tokens = torch.randint(97, (2, 65))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, ::3] = -100
    expected = cross_entropy(model(inputs), targets).sum()
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(inputs, targets=targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for given, has_logits in (({"targets": targets}, False), ({}, True)):
        with Shapes() as seen:
            model(inputs, **given)
        assert any(shape[-1:] == (97,) and len(shape) > 1 for shape in seen.shapes) == has_logits
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, targets=targets), expected, rtol=1e-6, atol=0)


def test_a_cache_gives_the_logits_of_the_whole_sequence() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**SIZES)).eval()
    tokens = torch.randint(97, (1, 20))
    with torch.no_grad():
        whole = model(tokens)
        cache, parts = KeyValueCache(20), []
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 20)):
            parts.append(model(tokens[:, start:end], cache=cache))
            cache.advance(end - start)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds 20 positions"), torch.no_grad():
        model(tokens[:, :1], cache=cache)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = (Decoder(DecoderConfig(**SIZES), seed=s) for s in (1, 1, 2))
    weights = dict(first.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert not torch.equal(other.head.weight, first.head.weight)
    assert not torch.equal(weights["layers.0.attention.q.weight"], weights["layers.1.attention.q.weight"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_kv_heads": 4}, "num_heads .6. must divide by num_kv_heads .4."),
        ({"head_size": 7}, "head_size .7. must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecoderConfig(**SIZES | change)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_tell_the_parameters(tied: bool) -> None:
    config = DecoderConfig(**SIZES, tied_embeddings=tied)
    with torch.device("meta"):
        parameters = dict(Decoder(config, seed=None).named_parameters())
    assert config.num_parameters == sum(p.numel() for p in parameters.values())
    assert all(parameters[name].shape == shape for name, shape in config.outer_shapes.items())


def test_a_weight_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="q_proj.bias has no place"):
        global_name("model.layers.0.self_attn.q_proj.bias")
