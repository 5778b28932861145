"""Attention's options: gradients of the reference, and that keys in parts give what all of them at once give.

The quick gradcheck compares random combinations of all derivatives, the long one each derivative.
"""

import functools
import math

import pytest
import torch

from pypar.ops.attention import attention
from pypar.ops.attention.arguments import Positions, attention_problem
from pypar.ops.attention.reference import sinks_gradient
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import expect, outputs_and_gradients
from tests.ops.attention.matrix import AXES, SHORT_LENGTHS, operands, sample
from tests.ops.attention.test_matrix import BY_NAME, SHORT, device_of

B, T, S, N, G, H, Hv = 2, 3, 5, 2, 1, 2, 1


def doubles(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HIDING = doubles(B, 1, 1, S).masked_fill(torch.arange(S) % 3 == 1, -math.inf)
OPTIONS = {
    "nothing": {},
    "scale": {"scale": -0.7},
    "causal": {"causal": True},
    "local": {"window": (1, 1)},
    "left": {"window": (2, None)},
    "right": {"window": (None, 0)},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": doubles(N)},
    "slopes": {"alibi_slopes": doubles(N).abs()},
    "slopes of each batch element": {"alibi_slopes": doubles(B, N).abs()},
    "bias": {"bias": doubles(B, N, T, S)},
    "bias for all heads": {"bias": doubles(B, 1, T, S)},
    "bias of keys": {"bias": doubles(S)},
    "bias of rows": {"bias": doubles(N, T, 1)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
}
VARLEN = {
    "cu_seqlens_q": torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32),
}
CAUSAL_SOFTCAP = {"causal": True, "softcap": 0.9, "sinks": doubles(N), "dropout_p": 0.3, "dropout_seed": 3}
COMBINED = {
    "all": {
        **CAUSAL_SOFTCAP,
        "window": (2, None),
        "bias": doubles(B, N, T, S),
        "alibi_slopes": doubles(N).abs(),
    },
    "hidden keys": {"bias": HIDING, "window": (3, 1), "softcap": 1.3, "dropout_p": 0.2, "dropout_seed": 9},
    "sequences": VARLEN,
    "sequences, all": {**VARLEN, **CAUSAL_SOFTCAP, "window": (2, None), "alibi_slopes": doubles(4, N).abs()},
}


@pytest.mark.parametrize("name", [*OPTIONS, *COMBINED])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck_of_the_reference(name, swapped, fast):
    """By finite differences in fp64; swapped: with more queries than keys, some of which then see nothing."""
    options = (OPTIONS | COMBINED)[name]
    lengths = (S, T) if swapped else (T, S)
    if "cu_seqlens_q" in options:
        ends = options["cu_seqlens_q"], options["cu_seqlens_k"]
        options = options | dict(
            zip(("cu_seqlens_q", "cu_seqlens_k"), ends[::-1] if swapped else ends, strict=True)
        )
        shapes = [(int(options[f"cu_seqlens_{x}"][-1]), heads, size) for x, heads, size in
                  (("q", N, H), ("k", G, H), ("k", G, Hv))]  # fmt: skip
    else:
        shapes = [(B, lengths[0], N, H), (B, lengths[1], G, H), (B, lengths[1], G, Hv)]
        if swapped and isinstance(options.get("bias"), torch.Tensor):
            options = options | {
                "bias": options["bias"].mT if options["bias"].dim() > 1 else options["bias"][:T]
            }
    inputs = {n: doubles(*shape, seed=i) for i, (n, shape) in enumerate(zip("qkv", shapes, strict=True))}
    inputs |= {n: options[n] for n in ("sinks", "bias") if n in options}
    if "bias" in inputs:
        hidden = inputs["bias"] == -math.inf
        inputs["bias"] = inputs["bias"].masked_fill(hidden, 0.0)
    rest = {n: x for n, x in options.items() if n not in inputs}
    names = list(inputs)

    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        if "bias" in named:
            named["bias"] = named["bias"].masked_fill(hidden, -math.inf)
        out, lse = attention(**named, **rest, return_lse=True, backend="reference")
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_the_reference_in_fp64_is_plain_attention_in_fp64(case):
    """Two people's readings of one definition: they share the dropout generator and nothing else."""
    tensors, keywords = operands(case)
    outputs = outputs_and_gradients(lambda **x: plain_attention(**x, **keywords), tensors, double=True)[0]
    douts = [doubles(*x.shape) for x in outputs]
    ask = functools.partial(attention, backend="reference", return_lse=True, **keywords)
    ours = outputs_and_gradients(ask, tensors, douts, double=True)
    exact = outputs_and_gradients(functools.partial(plain_attention, **keywords), tensors, douts, double=True)
    for a, b in zip([*ours[0], *ours[1].values()], [*exact[0], *exact[1].values()], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9 * (1 + b[b.isfinite()].abs().amax(0).sum().item())
        )


# ---- keys in parts


def spans_of(ends, cut, before):
    """Keys [before, cut) of every sequence, as indices, and their cumulative lengths."""
    indices, lengths = [], [0]
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        first, last = min(start + before, end), min(start + cut, end)
        indices += range(first, last)
        lengths.append(lengths[-1] + last - first)
    return torch.tensor(indices, dtype=torch.long), torch.tensor(lengths, dtype=torch.int32)


def part_of(tensors, keywords, before, cut, with_sinks):
    """(problem, its keys) of an attention, keys [before, cut) of each sequence."""
    dim = tensors["k"].dim() - 3
    changed, at = dict(keywords), keywords["positions"]
    if "cu_seqlens_k" in keywords:
        keys, changed["cu_seqlens_k"] = spans_of(keywords["cu_seqlens_k"].tolist(), cut, before)
    else:
        keys = torch.arange(before, min(cut, tensors["k"].shape[dim]))
    chosen = {name: x.detach() for name, x in tensors.items()}
    chosen |= {name: chosen[name].index_select(dim, keys) for name in ("k", "v")}
    if "bias" in chosen and chosen["bias"].shape[-1] > 1:
        chosen["bias"] = chosen["bias"].index_select(-1, keys)
    if not with_sinks:
        chosen.pop("sinks", None)
    changed["positions"] = Positions(at.q_start, at.k_start + at.step * before, at.step)
    return attention_problem(**chosen, **changed), keys


def in_parts(backend, tensors, keywords, cuts, dout, dlse):
    """(out, lse, gradients) by carry and accumulation, a part of the keys at a time; sinks with the second part."""
    parts = [
        part_of(tensors, keywords, a, b, i == 1) for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    problem = parts[0][0]
    carry = torch.zeros(problem.out_shape), torch.full(problem.lse_shape, -math.inf)
    for problem, _ in parts:
        result = backend.forward(problem, carry)
        assert result[0] is carry[0] and result[1] is carry[1]
    out, lse = carry[0].to(dout.dtype), carry[1]
    sums = {name: torch.zeros(tensors[name].shape) for name in "qkv"}
    dim = tensors["k"].dim() - 3
    dscores = []
    for problem, keys in parts:
        dbias = None if problem.bias is None else torch.zeros(problem.scores_shape)
        share = [sums["q"], *(torch.zeros(x.shape) for x in (problem.k, problem.v))]
        # What is there already must stay: a share begins at one in places.
        share[1][..., ::2], share[2][..., ::2] = 1.0, 1.0
        backend.backward(problem, dout, out, lse, dlse, tuple(share), dbias)
        for name, x in zip("kv", share[1:], strict=True):
            x[..., ::2] -= 1.0
            sums[name].index_add_(dim, keys, x)
        dscores.append(dbias)
    gradients = {name: x.to(dout.dtype) for name, x in sums.items()}
    if "bias" in tensors:
        bias = tensors["bias"]
        gradients["bias"] = torch.cat(dscores, -1).sum_to_size(bias.shape).to(bias.dtype)
    return [out, lse], gradients


PARTS = [case for case in sample({**AXES, "lengths": tuple(SHORT_LENGTHS), "H": (40, 64)}, seed=2)
         if case.lengths[1] > 60][::2]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in BY_NAME for case in PARTS], ids=str)
def test_keys_in_parts(name, case):
    """Forward by carrying out and lse on, backward by adding to the gradients; cut in odd places, one part empty."""
    if device_of(name) != "cpu":
        pytest.skip(f"{name} does not run on the CPU")
    tensors, keywords = operands(case)
    rows, length = case.lengths
    start = 11 if case.varlen else length - rows
    keywords["positions"] = Positions(q_start=start)
    cuts = {0: (0, 31, length), 1: (0, 1, 50, 50, length), 2: (0, 17, 18, 33, 64, length)}[len(str(case)) % 3]
    plain_outputs = plain_attention(**tensors, **keywords)
    generator = torch.Generator().manual_seed(7)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in plain_outputs)
    ask = functools.partial(plain_attention, **keywords)
    expected = expect(ask, tensors, [dout, dlse])
    outputs, gradients = in_parts(BY_NAME[name], tensors, keywords, cuts, dout, dlse)
    for what, output in zip(("out", "lse"), outputs, strict=True):
        expected.check(what, output)
    for what, gradient in gradients.items():
        expected.check(f"d{what}", gradient)

    if "sinks" in tensors:
        dsinks = sinks_gradient(tensors["sinks"].detach(), dout, *outputs, dlse)
        torch.testing.assert_close(dsinks, expected.exact["dsinks"].float(), rtol=2e-2, atol=2e-2)
