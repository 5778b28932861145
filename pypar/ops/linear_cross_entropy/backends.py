"""What linear_cross_entropy's backends compute, and the backends: they differ in what happens between the products, in
how these are made, and in the sizes of blocks and chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pypar.ops.backend import never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.cross_entropy import check_range
from pypar.ops.linear_cross_entropy import rows
from pypar.ops.linear_cross_entropy.chunks import LossProblem, Needs, rows_of_a_chunk
from pypar.ops.linear_cross_entropy.loss import (
    TokenParts,
    TokenWeights,
    coefficients_of_loss,
    coefficients_of_parts,
    parts_of,
    token_loss,
)
from pypar.ops.linear_cross_entropy.passes import differentiate_all, measure_all, measure_and_differentiate
from pypar.ops.linear_cross_entropy.products import multiply_into, multiply_kept_into
from pypar.ops.linear_cross_entropy.rows import LossBackend
from pypar.ops.rows import as_rows, native_refusal

# A block of the weight in fp32: with the logits of a chunk it stays in a cache of the third level.
_BLOCK_BYTES = 16 << 20

# Below 64 tokens a product is short of work; from 512 to 1024 its rate grew no more (Zen 3, H 1024, V 8192).
_CPU_ROWS = (64, 512)
# For each chunk a number of the sum of the weight's gradient is read and written, 8 bytes, and multiplied and added for
# as often as the chunk has tokens. By NVIDIA's figures an H100 does the first while it does the second for 850 to 1,200
# tokens (3.35 TB/s, 700 to 989 TFLOP/s); shorter chunks would wait for memory. Nothing of this was measured.
_GPU_ROWS = (1024, 4096)


class LossInputs(NamedTuple):
    """What is differentiated, and by whose targets; see `linear_cross_entropy`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    softcap: float
    needs_mean: bool  # the mean logit is wanted, of which label smoothing is made

    def problem(self, backend: LossBackend) -> LossProblem:
        """The problem of one who has the whole vocabulary. ValueError on CPU: a target out of range."""
        hidden, target, vocabulary_size = as_rows(self.hidden), self.target.reshape(-1), self.weight.shape[0]
        counted: Tensor | None = target != self.ignore_index
        if target.device.type == "cpu":
            check_range(target, vocabulary_size, self.ignore_index)
            counted = None if bool(torch.all(counted)) else counted  # type: ignore[arg-type]
        T, H = hidden.shape
        chunk_rows = rows_of_a_chunk(T, H, vocabulary_size, backend.chunk_rows)
        return LossProblem(
            hidden,
            self.weight,
            self.bias,
            target,
            counted,
            self.softcap,
            backend,
            chunk_rows,
            self.needs_mean,
        )

    def parts(self, state: Tensor) -> tuple[Tensor, ...]:
        """TokenParts of statistics [4, T], in the shape of target."""
        counted = self.target.reshape(-1) != self.ignore_index
        parts = parts_of(state, counted, self.weight.shape[0], self.needs_mean)
        return tuple(x.view(self.target.shape) for x in parts)


def parts(backend: LossBackend, *inputs: Any) -> tuple[Tensor, ...]:
    given = LossInputs(*inputs)
    return given.parts(measure_all(given.problem(backend), None))


def parts_backward(
    backend: LossBackend,
    dtotal: Tensor,
    dtarget_logit: Tensor,
    dmean_logit: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    total: Tensor,
    maximum: Tensor,
    *options_and_needs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, needs = options_and_needs
    given = LossInputs(hidden, weight, bias, target, *options)
    problem = given.problem(backend)
    counted = problem.targets != given.ignore_index
    dparts = [torch.where(counted, x.reshape(-1), 0.0) for x in (dtotal, dtarget_logit, dmean_logit)]
    coefficients = coefficients_of_parts(
        dparts[0], dparts[1], dparts[2] if given.needs_mean else None, weight.shape[0]
    )
    state = torch.stack((maximum.reshape(-1), total.reshape(-1)))
    return _shaped(differentiate_all(problem, None, coefficients, state, needs), hidden, needs)


def with_gradients(
    backend: LossBackend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weights: Tensor,
    divisor: Tensor,
    *options_and_needs: Any,
) -> tuple[Tensor, ...]:
    """(sum of token_weights x the loss of each token / divisor, TokenParts, gradients of that quotient)."""
    ignore_index, softcap, label_smoothing, z_loss, needs = options_and_needs
    given = LossInputs(hidden, weight, bias, target, ignore_index, softcap, label_smoothing != 0)
    flat = TokenWeights(token_weights.reshape(-1), divisor)
    coefficients = coefficients_of_loss(flat, label_smoothing, z_loss, weight.shape[0])
    state, gradients = measure_and_differentiate(given.problem(backend), None, coefficients, needs)
    parts = given.parts(state)
    loss = TokenWeights(token_weights, divisor).total(token_loss(TokenParts(*parts), label_smoothing, z_loss))
    return loss, *parts, *_shaped(gradients, hidden, needs)


def _shaped(gradients: Any, hidden: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = gradients.hidden.view(hidden.shape) if needs[0] else gradients.hidden
    return dhidden, gradients.weight, gradients.bias


def _native_unsupported(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
) -> str | None:
    return native_refusal(hidden, weight, target, *(() if bias is None else (bias,)))


def _triton_unsupported(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
) -> str | None:
    return triton_refusal(hidden, weight, target, bias)


_FUNCTIONS = parts, parts_backward  # of every backend, which is their first argument

BACKENDS = (
    LossBackend(
        "native",
        *_FUNCTIONS,
        _native_unsupported,
        rows.native_statistics,
        rows.native_gradient,
        multiply_into,
        keeps_operands=False,
        block_bytes=_BLOCK_BYTES,
        chunk_rows=_CPU_ROWS,
    ),
    LossBackend(
        "triton",
        *_FUNCTIONS,
        _triton_unsupported,
        rows.triton_statistics,
        rows.triton_gradient,
        multiply_kept_into,
        keeps_operands=True,
        block_bytes=None,
        chunk_rows=_GPU_ROWS,
    ),
    LossBackend(
        "reference",
        *_FUNCTIONS,
        never_refuses,
        rows.plain_statistics,
        rows.plain_gradient,
        multiply_into,
        keeps_operands=False,
        block_bytes=None,
        chunk_rows=_CPU_ROWS,
    ),
)
BY_NAME = {backend.name: backend for backend in BACKENDS}
