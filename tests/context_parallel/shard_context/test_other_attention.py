"""Attention that `pypar.shard_context` cannot run over a group is refused, however it is called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import pypar
from pypar.mesh import Axis
from tests.harness.simulated_ranks import run_ranks


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash(q: torch.Tensor) -> torch.Tensor:
    """In place of FlashAttention's operator, under its name: what it computes does not matter."""
    return q.clone()


class FlashFunction(torch.autograd.Function):
    """As FlashAttention's own functions call it."""

    @staticmethod
    def forward(ctx, q):
        return torch.ops.flash_attn._flash_attn_forward(q)

    @staticmethod
    def backward(ctx, dout):
        return dout


def x_of():
    return torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def causal(b, h, i, j):
    return i >= j


CALLS = {
    "flex_attention": lambda x: flex_attention(x, x, x),
    "flex_attention with a mask": lambda x: flex_attention(
        x, x, x, block_mask=create_block_mask(causal, None, None, 16, 16, device="cpu")
    ),
    "flex_attention compiled": lambda x: torch.compile(flex_attention, backend="eager")(x, x, x),
    "flash_attn": lambda x: FlashFunction.apply(x.requires_grad_()),
    "its operator": lambda x: torch.ops.flash_attn._flash_attn_forward.default(x),
    "torch's kernel": lambda x: torch._scaled_dot_product_flash_attention_for_cpu(x, x, x),
    "aten's kernel": lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_refused_in_the_block_and_runs_after_it(name):
    # Inside torch.compile no other type of error gets through; the sentence does.
    error = (ValueError, torch._dynamo.exc.Unsupported)
    with (
        pypar.shard_context(Axis.single("cp")),
        pytest.raises(error, match="under shard_context would attend to the keys of this rank alone"),
    ):
        CALLS[name](x_of())
    CALLS[name](x_of())


def test_a_compiled_flex_attention_is_refused_where_it_ran_before():
    compiled = torch.compile(flex_attention, backend="eager")
    compiled(x_of(), x_of(), x_of())
    with pypar.shard_context(Axis.single("cp")), pytest.raises(ValueError, match="flex_attention under"):
        compiled(x_of(), x_of(), x_of())


def _kernel_on_one_rank(axis):
    with pypar.shard_context(axis):
        x = x_of()
        call = (
            torch._scaled_dot_product_flash_attention_for_cpu if axis.rank else F.scaled_dot_product_attention
        )
        call(x, x, x)


def test_one_rank_that_calls_it_stops_the_others():
    for error in run_ranks(2, _kernel_on_one_rank, outcomes=True):
        with pytest.raises(
            ValueError, match="_scaled_dot_product_flash_attention_for_cpu under shard_context"
        ):
            raise error


def _exported(axis, module):
    with pypar.shard_context(axis) as context:
        return context.unshard(module(context.shard(x_of(), 2)), 2)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_an_exported_model_runs_over_the_group():
    module = torch.export.export(Attention(), (x_of()[:, :, :8],)).module()
    for out in run_ranks(2, _exported, module):
        torch.testing.assert_close(out, Attention()(x_of()))


def _encoder(axis, model, x):
    with pypar.shard_context(axis) as context, torch.no_grad():
        return context.unshard(model(context.shard(x, 1)), 1)


def test_torch_encoders_fast_path_is_left_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2).eval()
    x = x_of()[0]
    with torch.no_grad():
        expected = model(x)
    for out in run_ranks(2, _encoder, model, x):
        torch.testing.assert_close(out, expected)
