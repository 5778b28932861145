"""Attention as an operator of torch: its backends, schema, fake and gradient.

A backend's forward(problem, carry) returns `AttentionResults`; its backward(problem, dout, out, lse, dlse, into, dbias,
lse_rest) gives (dq, dk, dv).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.attention import cuda as attention_cuda
from pypar.ops.attention import native as attention_native
from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention import triton as attention_triton
from pypar.ops.attention.arguments import AttentionProblem, AttentionResults
from pypar.ops.backend import Backend, never_refuses
from pypar.ops.register import define, register_gradient
from pypar.ops.rows import accumulate_dtype, native_refusal

# ---- backends


def _native_unsupported(problem: AttentionProblem) -> str | None:
    return native_refusal(problem.q, problem.k, problem.v)


def _native_forward(problem: AttentionProblem, carry: tuple[Tensor, Tensor] | None) -> AttentionResults:
    wants_rest = carry is None and _makes_rest(problem, "native")
    lse_rest = problem.q.new_empty(problem.lse_shape) if wants_rest else None
    return AttentionResults(*attention_native.forward(native.module(), problem, carry, lse_rest), lse_rest)


def _native_backward(problem: AttentionProblem, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_native.backward(native.module(), problem, *arguments)


def _makes_rest(problem: AttentionProblem, backend: str) -> bool:
    """Whether a backend's forward returns what rounding took off lse.

    In fp32 it is the largest error of the probabilities that backward recomputes from lse. With inputs of 16 bits
    it is far below theirs.
    """
    return backend == "native" and problem.q.dtype == torch.float32


BY_NAME = {
    backend.name: backend
    for backend in (
        Backend("cuda", attention_cuda.forward, attention_cuda.backward, attention_cuda.unsupported),
        Backend("triton", attention_triton.forward, attention_triton.backward, attention_triton.unsupported),
        Backend("native", _native_forward, _native_backward, _native_unsupported),
        Backend("reference", attention_reference.forward, attention_reference.backward, never_refuses),
    )
}


# ---- registration

_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "int": "int"}
# The operator takes a problem's fields one by one; ranks' positions are not for it.
_ARGUMENTS = {
    field.name: _SCHEMA_TYPES[str(field.type)]
    for field in fields(AttentionProblem)
    if field.name != "positions"
}
_FIELDS = tuple(_ARGUMENTS)
_TENSORS = tuple(name for name, kind in _ARGUMENTS.items() if kind.startswith("Tensor"))
_PROBLEM = ", ".join(f"{kind} {name}" for name, kind in _ARGUMENTS.items()) + ", str backend"


def flat(problem: AttentionProblem) -> tuple:
    """The problem as the operator's arguments, without the backend's name."""
    return tuple(getattr(problem, name) for name in _FIELDS)


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    out, lse, rest = BY_NAME[backend].forward(AttentionProblem(*given), None)
    return out, lse, lse.new_empty(0) if rest is None else rest


def _run_backward(  # noqa: PLR0913 # the operator's arguments
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    dlse: Tensor | None,
    bias_needs: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *given, backend = arguments
    problem = AttentionProblem(*given)
    q, sinks, bias = problem.q, problem.sinks, problem.bias
    dscores = q.new_zeros(problem.scores_shape, dtype=lse.dtype) if bias_needs else None
    run = BY_NAME[backend].backward
    assert run is not None
    dq, dk, dv = run(problem, dout, out, lse, dlse, None, dscores, lse_rest if lse_rest.numel() else None)
    if sinks is None and dlse is None and problem.cu_seqlens_k is None and problem.k.shape[1] == 1:
        # The softmax of one score is 1 whatever the score, but dp - delta is what rounding leaves of 0. NaN stays.
        for x in (dq, dk) if dscores is None else (dq, dk, dscores):
            x *= 0
    dsinks = (
        q.new_empty(0)
        if sinks is None
        else attention_reference.sinks_gradient(sinks, dout, out, lse, dlse).to(sinks.dtype)
    )
    if dscores is None or bias is None:
        return dq, dk, dv, dsinks, q.new_empty(0)
    return dq, dk, dv, dsinks, _bias_gradient(dscores, bias)


def _bias_gradient(dscores: Tensor, bias: Tensor) -> Tensor:
    """The sum over what the bias was broadcast to. In fp64, one head at a time, which needs little memory."""
    if bias.shape == dscores.shape:
        return dscores.to(bias.dtype)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    total = dscores.new_zeros(shape, dtype=torch.float64)
    for b in range(dscores.shape[0]):
        for n in range(dscores.shape[1]):
            total[b % shape[0], n % shape[1]] += dscores[b, n].double().sum_to_size(shape[2:])
    return total.reshape(bias.shape).to(bias.dtype)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    problem = AttentionProblem(*given)
    lse = problem.q.new_empty(problem.lse_shape, dtype=accumulate_dtype(problem.q))
    rest = lse.new_empty(lse.shape if _makes_rest(problem, backend) else 0)
    return problem.q.new_empty(problem.out_shape), lse, rest


def _fake_backward(  # noqa: PLR0913
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    dlse: Tensor | None,
    bias_needs: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    p = AttentionProblem(*arguments[:-1])
    dsinks = p.q.new_empty(0) if p.sinks is None else p.sinks.new_empty(p.sinks.shape)
    dbias = p.bias.new_empty(p.bias.shape) if bias_needs and p.bias is not None else p.q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (p.q, p.k, p.v)), dsinks, dbias)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ctx.backend = inputs
    p = AttentionProblem(*given)
    ctx.options = replace(p, **dict.fromkeys(_TENSORS))  # type: ignore[arg-type] # autograd keeps the tensors
    ctx.save_for_backward(*(getattr(p, name) for name in _TENSORS), *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
    *tensors, out, lse, lse_rest = ctx.saved_tensors
    problem = replace(ctx.options, **dict(zip(_TENSORS, tensors, strict=True)))
    if dout is None:
        dout = torch.zeros_like(out)
    bias_needs = problem.bias is not None and ctx.needs_input_grad[_FIELDS.index("bias")]
    gradients = _backward_op(dout, out, lse, lse_rest, dlse, bias_needs, *flat(problem), ctx.backend)
    dq, dk, dv, dsinks, dbias = gradients
    named = {
        "q": dq,
        "k": dk,
        "v": dv,
        "sinks": None if problem.sinks is None else dsinks,
        "bias": dbias if bias_needs else None,
    }
    return (*(named.get(name) for name in _FIELDS), None)


run_forward = define(
    "attention_forward", f"({_PROBLEM}) -> (Tensor, Tensor, Tensor)", _run_forward, _fake_forward
)
_backward_op = define(
    "attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor lse_rest, Tensor? dlse, bool bias_needs, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
register_gradient("attention", _gradient, _save)
