"""What is kept between forward and backward, to the byte, and the formula that predicts it."""

import pytest
import torch
from torch import nn

import pypar
from pypar.models import Decoder, DecoderConfig
from pypar.models.activations import Microbatch, layer_bytes
from pypar.ops import native
from pypar.recomputation import SavedBytes
from pypar.recomputation.operators import COSTLY

SIZES = {"vocab_size": 40, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "head_size": 8, "d_ff": 52}
B, T = 2, 19
POLICIES = [
    ("none", None),
    ("full", None),
    ("selective", None),
    ("selective", ["attention"]),
    ("selective", ["rms_norm", "rope"]),
    ("selective", ["attention", "linear", "gated"]),
]


def _decoder(num_layers, dtype):
    return Decoder(DecoderConfig(num_layers=num_layers, **SIZES), dtype=dtype)


def saved(num_layers, dtype, policy, **options):
    """Bytes after a forward of so many layers, and once its backward is over."""
    model = _decoder(num_layers, dtype)
    pypar.recompute(model, policy, **options)
    tokens = torch.arange(B * T).view(B, T) % 40
    with SavedBytes(model) as counted:
        loss = model(tokens, targets=tokens)
    num_bytes = counted.num_bytes
    loss.backward()
    return num_bytes, counted.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("policy", "ops"), POLICIES, ids=str)
def test_a_layer_keeps_what_the_formula_says(policy, ops, dtype):
    exact_lse = dtype == torch.float32 and native.missing() is None
    given = Microbatch(B, T, dtype.itemsize, lse_copies=2 if exact_lse else 1)
    kept = COSTLY if policy == "selective" and ops is None else ops or ()
    config = DecoderConfig(num_layers=1, **SIZES)
    expected = layer_bytes(config, given, recomputed=policy != "none", kept=kept)
    (two, after), (five, _) = (saved(n, dtype, policy, ops=ops) for n in (2, 5))
    assert five - two == 3 * expected
    assert after <= B * T * 8  # the ids of the tokens, which are the caller's


def test_every_nth_layer():
    plain, one = (layer_bytes(DecoderConfig(num_layers=1, **SIZES), Microbatch(B, T, 4, lse_copies=2), recomputed=r)
                  for r in (False, True))  # fmt: skip
    if native.missing() is not None:
        pytest.skip(native.missing())
    none = saved(5, torch.float32, "none")[0]
    for every, num_recomputed in ((1, 5), (2, 3), (3, 2), (9, 1)):
        assert saved(5, torch.float32, "full", every=every)[0] == none - num_recomputed * (plain - one)


def test_memory_counts_once_with_all_that_it_keeps_alive():
    x = torch.ones(10, 4, requires_grad=True)
    layer = nn.Linear(4, 4, bias=False)
    with SavedBytes(layer) as counted:
        whole = x * 2
        y = (layer(whole[:3]) * layer(whole[1:2])).exp()
    assert counted.num_bytes == 4 * (40 + 12 + 4 + 12)  # whole, both products, exp's result; not the weight
    del y
    assert counted.num_bytes == 160  # whole itself
