"""Under `pypar.shard_context` the attention of unmodified code runs over a group, as if one process had it all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pypar
from pypar.mesh import Axis
from tests.harness.simulated_ranks import run_ranks

WIDTH, HEADS = 16, 4


class Block(nn.Module):
    """Grouped-query attention through torch's function."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH * 2)

    def forward(self, x):
        q, k, v = (
            self.qkv(x)
            .unflatten(-1, (-1, WIDTH // HEADS))
            .transpose(1, 2)
            .split([HEADS, HEADS // 2, HEADS // 2], 1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Knows its tokens and their positions, and nothing of ranks."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(64, WIDTH)
        self.block, self.checkpointed = Block(), checkpointed
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)

    def forward(self, tokens, positions):
        x = self.tokens(tokens) + self.positions(positions)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, mask, is_causal=True)


def model_of(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(**options).double()


def tokens_of(length, high=11, batch=2):
    return torch.randint(high, (batch, length), generator=torch.Generator().manual_seed(1))


def results(model, tokens, positions, weights):
    """(hidden states, gradients of all weights) of a loss that is a sum over positions."""
    out = model(tokens, positions)
    (out * weights).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def weights_of(length, width=WIDTH):
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def over(axis, model, length, **options):
    model = copy.deepcopy(model)
    with pypar.shard_context(axis, length=length, **options) as context:
        parts = [context.shard(x, 1) for x in (tokens_of(length), weights_of(length))]
        out, gradients = results(model, parts[0], context.positions(length), parts[1])
        return context.unshard(out, 1), gradients


def assert_one_process(outcome, expected):
    """Every rank's whole output is the one process's, and so is the sum of the ranks' gradients."""
    for out, _ in outcome:
        torch.testing.assert_close(out, expected[0], rtol=1e-9, atol=1e-9)
    for gradient, *shares in zip(expected[1], *(gradients for _, gradients in outcome), strict=True):
        torch.testing.assert_close(sum(shares), gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("length", [24, 19])
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses", "auto"])
@pytest.mark.parametrize(
    ("size", "layout"), [(1, "zigzag"), (2, "contiguous"), (3, "zigzag"), (4, "striped")]
)
def test_a_model_of_torch_is_as_in_one_process(method, size, layout, length):
    model = model_of()
    expected = results(model, tokens_of(length), torch.arange(length), weights_of(length))
    assert_one_process(run_ranks(size, _kept, model_of(), length, method, layout), expected)


def _kept(axis, model, length, method, layout):
    return over(axis, model, length, method=method, layout=layout)


def test_checkpoints_run_forward_again_over_the_group():
    expected = results(model_of(), tokens_of(24), torch.arange(24), weights_of(24))
    assert_one_process(run_ranks(2, _kept, model_of(checkpointed=True), 24, "ring", "zigzag"), expected)


def _real(length):
    return over(Axis.of(torch.distributed.group.WORLD, "cp"), model_of(), length)


def test_two_processes(ranks):
    expected = results(model_of(), tokens_of(21), torch.arange(21), weights_of(21))
    assert_one_process(ranks(2, _real, 21), expected)


# ---- calls of the op


def operands(T=12, S=None, N=4):
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, T, N, 8), *[(2, S or T, 2, 8)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _call(axis, options, whole, sharded, context_options):
    with pypar.shard_context(axis, **context_options) as context:
        part = {name: context.shard(x, x.dim() - 2) if name in sharded else x for name, x in options.items()}
        out = pypar.attention(*(context.shard(x, 1) for x in whole), **part)
        out, lse = out if options.get("return_lse") else (out, None)
        return context.unshard(out, 1), lse is None or context.unshard(lse, -1)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "softcap": 2.0, "sinks": torch.linspace(-1, 1, 4)},
        {"window": (3, 1), "alibi_slopes": torch.linspace(0.1, 1, 4), "return_lse": True},
        {"bias": torch.linspace(-2, 2, 144, dtype=torch.float64).view(12, 12)},
        {"causal": True, "dropout_p": 0.4, "dropout_seed": 77},
    ],
)
def test_options_of_the_op(options):
    whole = operands()
    expected = pypar.attention(*whole, **options)
    for out, lse in run_ranks(3, _call, options, whole, ("bias",), {}):
        if options.get("return_lse"):
            torch.testing.assert_close(lse, expected[1])
        torch.testing.assert_close(out, expected[0] if options.get("return_lse") else expected)


def test_cross_attention_over_keys_of_another_length():
    whole = operands(T=12, S=20)
    for out, _ in run_ranks(2, _call, {}, whole, (), {"length_k": 20}):
        torch.testing.assert_close(out, pypar.attention(*whole))


def _mask(axis, whole, mask):
    with pypar.shard_context(axis) as context:
        q, k, v = (context.shard(x, 1).transpose(1, 2) for x in whole)
        rows = context.shard(mask, mask.dim() - 2) if mask.shape[-2] > 1 else mask
        torch_out = F.scaled_dot_product_attention(q, k, v, rows, enable_gqa=True)
        own = pypar.scaled_dot_product_attention(q, k, v, rows, enable_gqa=True)
        return [context.unshard(out, 2) for out in (torch_out, own)]


@pytest.mark.parametrize("shape", [(12, 12), (2, 1, 12, 12), (2, 1, 1, 12)])
def test_masks_with_all_keys(shape):
    whole = operands()
    mask = (torch.arange(torch.Size(shape).numel()).view(shape) * 7919) % 5 > 0
    q, k, v = (x.transpose(1, 2) for x in whole)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    for outs in run_ranks(2, _mask, whole, mask):
        for out in outs:
            torch.testing.assert_close(out, expected)


def test_nothing_stays_after_the_block_and_the_innermost_context_counts():
    assert all(run_ranks(2, _nested))


def _nested(axis):
    q, k, v = (pypar.context_parallel.shard(x, 1, axis, "zigzag") for x in operands())
    alone = pypar.attention(q, k, v, causal=True)
    with pypar.shard_context(axis, method="all_gather") as context, pypar.shard_context(Axis.single("one")):
        inner = pypar.attention(q, k, v, causal=True)
        with context:
            again = pypar.attention(q, k, v, causal=True)
    return (
        torch.equal(inner, alone)
        and not torch.equal(again, alone)
        and torch.equal(alone, pypar.attention(q, k, v, causal=True))
    )


# ---- refusals


def _refused(axis, call):
    with pypar.shard_context(axis) as context:
        q, k, v = (context.shard(x, 1) for x in operands())
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        x = q.flatten(2)
        calls = {
            "mask": lambda: F.scaled_dot_product_attention(
                *heads_first, torch.ones(6, 6).bool(), enable_gqa=True
            ),
            "bias": lambda: pypar.attention(q, k, v, bias=torch.zeros(6, 6).double()),
            "documents": lambda: pypar.attention(
                *(x[0] for x in (q, k, v)),
                **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 6]).int()),
            ),
            "cache": lambda: pypar.attention(q[:, -1:], k, v, causal=True),
            "weights": lambda: nn.MultiheadAttention(32, 4).double()(x, x, x),
            "one rank": lambda: (
                pypar.attention(q, k, v, bias=torch.zeros(6, 6).double())
                if axis.rank
                else pypar.attention(q, k, v)
            ),
        }
        calls[call]()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("mask", r"attn_mask \(6, 6\) has columns for 6 keys.*whole sequence's 12 keys"),
        ("bias", r"bias \(6, 6\) has columns for 6 keys"),
        ("documents", "cu_seqlens of this rank's sequences have no meaning"),
        ("cache", "1 queries and 6 keys on rank . are not parts of one sequence"),
        ("weights", "cannot have need_weights"),
        ("one rank", "bias .* has columns"),
    ],
)
def test_what_has_no_clear_meaning_is_refused_on_every_rank(call, sentence):
    for error in run_ranks(2, _refused, call, outcomes=True):
        with pytest.raises(ValueError, match=sentence):
            raise error


def test_a_wrong_method_or_layout_is_refused_at_once():
    with pytest.raises(ValueError, match="did you mean 'ring'"):
        pypar.shard_context(Axis.single("cp"), method="rings")
    with pytest.raises(ValueError, match="did you mean 'zigzag'"):
        pypar.shard_context(Axis.single("cp"), layout="zig-zag")
