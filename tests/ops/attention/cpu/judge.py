"""How a call of attention's CPU kernels is judged, by the plain formula in fp64, and the calls to judge."""

import math

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.attention import native as attention_native
from pypar.ops.attention.arguments import AttentionProblem, Positions, attention_problem
from pypar.ops.attention.reference import dropout_keep
from pypar.selftest.judge import judge_result
from pypar.selftest.orders import in_orders

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(
    problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None
):
    """(out, lse) of one sequence, every step in q's dtype.

    Other than in pypar.selftest's plain attention, p is exp(x - lse), from the lse that a kernel saves: where a row
    sees one key p then differs from 1 by rounding, as a kernel's does.
    """
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    at = problem.positions or Positions(q_start=S - T)
    q_at = at.q_start + at.step * torch.arange(T)[:, None]
    k_at = at.k_start + at.step * torch.arange(S)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    x = torch.einsum("btnh,bsnh->bnts", q, k) * problem.scale
    if problem.softcap:
        x = problem.softcap * torch.tanh(x / problem.softcap)
    if bias is not None:
        x = x + bias.to(x.dtype)
    if problem.alibi_slopes is not None:
        x = x - (problem.alibi_slopes[..., None, None] * (q_at - k_at).abs()).to(x.dtype)
    seen = torch.ones(T, S, dtype=torch.bool)
    if problem.left >= 0:
        seen &= k_at >= q_at - problem.left
    if problem.right >= 0:
        seen &= k_at <= q_at + problem.right
    x = x.masked_fill(~seen, -math.inf)
    columns = [x, x.new_full((*x.shape[:3], 1), -math.inf) if sinks is None else _sink_column(sinks, x)]
    wide = torch.cat(columns, -1).to(torch.promote_types(x.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    nothing = lse == -math.inf
    p = (wide - lse.masked_fill(nothing, 0.0)[..., None]).exp()[..., :S].to(x.dtype)
    if problem.seed is not None:
        batch, head = torch.arange(q.shape[0]), torch.arange(q.shape[2])
        keep = dropout_keep(
            int(problem.seed),
            problem.dropout_p,
            at.batch_start + batch[:, None, None, None],
            at.head_start + head[:, None, None],
            q_at,
            k_at,
        )
        p = p * keep / (1 - problem.dropout_p)
    return torch.einsum("bnts,bsnh->btnh", p.to(v.dtype), v), lse


def _sink_column(sinks: Tensor, x: Tensor) -> Tensor:
    return sinks.to(x.dtype)[:, None, None].expand(*x.shape[:3], 1)


def sequence_slices(problem: AttentionProblem):
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        return None
    ends = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    return [tuple(slice(e[i], e[i + 1]) for e in ends) for i in range(len(ends[0]) - 1)]


def run_plain(
    problem: AttentionProblem, douts: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """out, lse and all gradients by autograd; rows that see nothing take no part in dlse."""
    names = ("q", "k", "v", "bias", "sinks")
    leaves = {
        name: x.detach().to(dtype).requires_grad_()
        for name in names
        if (x := getattr(problem, name)) is not None
    }
    bias, sinks = leaves.get("bias"), leaves.get("sinks")
    q, k, v = (leaves[name] for name in "qkv")
    slices = sequence_slices(problem)
    if slices is None:
        out, lse = plain(problem, q, k, v, bias, sinks)
    else:
        outs, lses = [], []
        for i, (rows, keys) in enumerate(slices):
            at = problem.positions or Positions(q_start=(keys.stop - keys.start) - (rows.stop - rows.start))
            part = AttentionProblem(
                **{
                    **problem.__dict__,
                    "positions": Positions(at.q_start, at.k_start, at.step, i, at.head_start),
                }
            )
            one, one_lse = plain(part, q[None, rows], k[None, keys], v[None, keys], None, sinks)
            outs.append(one[0])
            lses.append(one_lse[0])
        out, lse = torch.cat(outs), torch.cat(lses, -1)
    dout, dlse = douts
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    ((out * dout.to(out.dtype)).sum() + (finite * dlse.to(lse.dtype)).sum()).backward()
    results = {"out": out.detach(), "lse": lse.detach()}
    for name, x in leaves.items():
        if name != "sinks":
            results["d" + name] = torch.zeros_like(x) if x.grad is None else x.grad
    return results


def run_native(problem: AttentionProblem, douts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    out, lse = attention_native.forward(native.module(), problem, None)
    dbias = None if problem.bias is None else torch.zeros(problem.scores_shape)
    dout, dlse = douts[0].to(out.dtype), douts[1].masked_fill(lse == -math.inf, 0.0)
    dq, dk, dv = attention_native.backward(native.module(), problem, dout, out, lse, dlse, None, dbias)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if problem.bias is not None:
        results["dbias"] = dbias.sum_to_size(problem.bias.shape).to(problem.bias.dtype)
    return results


def make_douts(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(problem.out_shape, generator=generator).to(problem.q.dtype)
    return dout, torch.randn(problem.lse_shape, generator=generator)


def check(problem: AttentionProblem) -> None:
    douts = make_douts(problem)
    actual = run_native(problem, douts)
    exact = run_plain(problem, douts, torch.float64)
    fewest = min(x.numel() for x in exact.values())
    plains = in_orders(lambda: run_plain(problem, douts, problem.q.dtype), problem.q.dtype, fewest)
    for name, x in actual.items():
        judge_result(
            name, x, [found[name].to(x.dtype) for found in plains], exact[name], gradient=name[0] == "d"
        ).check()


def make(  # noqa: PLR0913
    T=127, S=203, N=4, G=2, H=40, Hv=None, B=2, dtype=torch.float32, **options
) -> AttentionProblem:
    """T x N x B are a thousand rows, so that two orders of summation are enough for the smallest result, lse."""
    generator = torch.Generator().manual_seed(1)
    shapes = (B, T, N, H), (B, S, G, H), (B, S, G, Hv or H)
    if "cu_seqlens_q" in options:
        shapes = tuple(shape[1:] for shape in shapes)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return attention_problem(q, k, v, **options)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def hiding_bias(B: int, N: int, T: int, S: int) -> Tensor:
    bias = random(B, N, T, S)
    return bias.masked_fill(bias > 0.8, -math.inf)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 10)},
    "left window": {"window": (17, None)},
    "right window": {"window": (None, 5)},
    "own position": {"window": (0, 0)},
    "causal window": {"causal": True, "window": (100, None)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": random(4).abs() * 0.05},
    "alibi of batch": {"alibi_slopes": random(2, 4).abs() * 0.05, "causal": True},
    "sinks": {"sinks": random(4) * 2, "causal": True},
    "bias": {"bias": hiding_bias(2, 4, 127, 203)},
    "bias of keys": {"bias": random(2, 1, 1, 203)},
    "bias of queries": {"bias": random(4, 127, 1)},
    "bias by columns": {"bias": random(2, 4, 203, 127).mT, "causal": True},
    "dropout": {"dropout_p": 0.17, "dropout_seed": 12345678901234},
    "dropout, causal": {"dropout_p": 0.5, "dropout_seed": 3, "causal": True},
    "positions": {"causal": True, "positions": Positions(300, 200, 1)},
    "striped": {"window": (100, 20), "positions": Positions(1, 0, 2)},
    "striped, negative": {
        "causal": True,
        "positions": Positions(-205, -250, 4),
        "alibi_slopes": random(4).abs() * 0.01,
    },
    "negative scale": {"scale": -0.2, "causal": True},
    "scale 0": {"scale": 0.0},
    "everything": {
        "window": (90, 20),
        "softcap": 5.0,
        "alibi_slopes": random(4).abs() * 0.02,
        "sinks": random(4),
        "bias": hiding_bias(2, 4, 127, 203),
        "dropout_p": 0.2,
        "dropout_seed": 99,
    },
}


SEQUENCES = {
    "mixed": ([0, 30, 30, 127, 130, 250], [0, 41, 50, 50, 290, 400]),
    "one": ([0, 100], [0, 150]),
    "empty ones": ([0, 0, 0, 5, 5], [0, 0, 3, 12, 12]),
    "no keys": ([0, 10, 120], [0, 0, 0]),
    "decoding": ([0, 1, 2, 3, 4], [0, 500, 500, 1200, 1203]),
}


def varlen(name: str, **options) -> AttentionProblem:
    lengths_q, lengths_k = SEQUENCES[name]
    cu_seqlens = {
        "cu_seqlens_q": torch.tensor(lengths_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(lengths_k, dtype=torch.int32),
    }
    return make(lengths_q[-1], lengths_k[-1], H=40, **cu_seqlens, **options)
