"""The loss of a language model: cross-entropy of each token, in one read of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.ops import native
from pypar.ops.backend import Backend, choose, never_refuses
from pypar.ops.backend.gpu import triton_refusal
from pypar.ops.register import register, register_gradient
from pypar.ops.rows import accumulate_dtype, as_rows, native_refusal


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, *, backend: str | None = None
) -> Tensor:
    """logsumexp(logits) - logits[target] of each token, in nats, computed in fp32.

    logits: [..., V], any strides; targets: [...] int64 in [0, V) or ignore_index. Returns [...] float32
    (float64 for float64 logits), not reduced; an ignored token gives 0 and no gradient. On a GPU a target out
    of range is undefined, as in PyTorch. ValueError: shapes that do not fit, targets that are not int64, on
    CPU a target out of range, a backend that refuses.
    """
    check_targets(targets, "logits", logits)
    chosen = choose("cross_entropy", BACKENDS, {"logits": logits, "targets": targets}, backend)
    return _forward(logits, targets, ignore_index, chosen.name)[0]


def reference_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition. Returns (loss, maximum, total), each [...], fp32 unless logits are fp64.

    logsumexp = maximum + log(total). The two are kept apart, since adding a large maximum to the logarithm
    would lose the digits of a small loss. Both are 0 and 1 for an ignored token.
    """
    counted = targets != ignore_index
    check_range(targets, logits.shape[-1], ignore_index)
    wide = torch.where(counted.unsqueeze(-1), logits.to(accumulate_dtype(logits)), -torch.inf)
    if not logits.numel():
        zero = wide.new_zeros(targets.shape)
        return zero, zero.clone(), zero + 1
    maximum = wide.amax(-1)
    maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    total = torch.where(counted, (wide - maximum.unsqueeze(-1)).exp().sum(-1), 1.0)
    picked = wide.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    loss = torch.where(counted, total.log() - (picked - maximum), 0.0)
    return loss.contiguous(), maximum.contiguous(), total.contiguous()


def reference_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    """dlogits = dloss * (softmax(logits) - onehot(targets)), 0 for ignored tokens."""
    counted = (targets != ignore_index).unsqueeze(-1)
    dlogits = (logits.to(total.dtype) - maximum.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    if logits.shape[-1]:
        picked = torch.where(counted, targets.unsqueeze(-1), 0)
        dlogits.scatter_add_(-1, picked, torch.full_like(picked, -1.0, dtype=total.dtype))
    dlogits = torch.where(counted, dlogits * dloss.to(total.dtype).unsqueeze(-1), 0.0)
    return dlogits.to(logits.dtype).contiguous()


def check_targets(targets: Tensor, name: str, logits: Tensor) -> None:
    """ValueError unless targets are int64 and one for each row of logits, which a sentence calls `name`."""
    if logits.dim() < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the shape of {name} {tuple(logits.shape)} without its "
            f"last dimension; reshape targets to {tuple(logits.shape[:-1])}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} and must be int64; convert with targets.long()")


def check_range(targets: Tensor, vocabulary_size: int, ignore_index: int) -> None:
    """ValueError where a target on the CPU is no word; a GPU is not waited for."""
    if targets.device.type == "cpu":
        wrong = ((targets < 0) | (targets >= vocabulary_size)) & (targets != ignore_index)
        if wrong.any():
            raise out_of_range(int(targets[wrong][0]), vocabulary_size, ignore_index)


def out_of_range(target: int, vocabulary_size: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"targets contains {target}, outside of [0, {vocabulary_size}) and not ignore_index "
        f"({ignore_index}); check the tokenizer against the vocabulary of the logits"
    )


def _native_unsupported(logits: Tensor, targets: Tensor) -> str | None:
    return native_refusal(logits, targets)


def _native_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = as_rows(logits)
    targets = targets.contiguous()
    loss, maximum, total = (torch.empty(targets.shape, dtype=torch.float32) for _ in range(3))
    wrong_row = native.run(
        native.module().cross_entropy_forward,
        rows, targets, loss, maximum, total,
        rows.shape[0], rows.shape[1], rows.stride(0), ignore_index,
        native.dtype_code(logits), native.num_threads(),
    )  # fmt: skip
    if wrong_row >= 0:
        raise out_of_range(int(targets.flatten()[wrong_row]), rows.shape[1], ignore_index)
    return loss, maximum, total


def _native_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    rows = as_rows(logits)
    dloss = dloss.float().contiguous()
    targets = targets.contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    native.run(
        native.module().cross_entropy_backward,
        dloss, rows, targets, maximum, total,
        dlogits, rows.shape[0], rows.shape[1], rows.stride(0), ignore_index,
        native.dtype_code(logits), native.num_threads(),
    )  # fmt: skip
    return dlogits


def _triton_unsupported(logits: Tensor, targets: Tensor) -> str | None:
    return triton_refusal(logits, targets)


def _triton_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    from pypar.kernels import cross_entropy

    check_range(targets, logits.shape[-1], ignore_index)
    loss, maximum, total = cross_entropy.forward(as_rows(logits), _flat(targets), ignore_index)
    return loss.view(targets.shape), maximum.view(targets.shape), total.view(targets.shape)


def _triton_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    from pypar.kernels import cross_entropy

    of_tokens = _flat(targets), maximum.reshape(-1), total.reshape(-1)
    dlogits = cross_entropy.backward(_flat(dloss.float()), as_rows(logits), *of_tokens, ignore_index)
    return dlogits.view(logits.shape)


def _flat(x: Tensor) -> Tensor:
    """One number for each token, side by side; a gradient may be one number that was expanded."""
    return x.reshape(-1).contiguous()


BACKENDS = (
    Backend("native", _native_forward, _native_backward, _native_unsupported),
    Backend("triton", _triton_forward, _triton_backward, _triton_unsupported),
    Backend("reference", reference_forward, reference_backward, never_refuses),
)


def _fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(targets.shape, dtype=accumulate_dtype(logits))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _fake_backward(dloss: Tensor, logits: Tensor, *_rest: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, targets, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, output[1], output[2])


def _gradient(ctx: Any, dloss: Tensor, _dmaximum: Tensor, _dtotal: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.backend), None, None, None


_INPUTS = "Tensor logits, Tensor targets"
_OPTIONS = "int ignore_index, str backend"
_forward = register(
    "cross_entropy",
    "forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    BACKENDS,
    _fake_forward,
)
_backward = register(
    "cross_entropy",
    "backward",
    f"(Tensor dloss, {_INPUTS}, Tensor maximum, Tensor total, {_OPTIONS}) -> Tensor",
    BACKENDS,
    _fake_backward,
)
register_gradient("cross_entropy", _gradient, _save)
