"""Cases of adamw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops.adamw import Blocks, Update, adamw, zero_blocks
from pypar.selftest.case import Case, Draw, Inputs, Peer

UPDATE = Update(step=3, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
_SCALE = 0.5


@dataclass(frozen=True)
class Form:
    """What is stored how: a master in fp32, or none; moments in fp32, in the parameter's type, or in 8 bits."""

    name: str
    master: bool = False
    moments: torch.dtype | None = torch.float32  # None: the parameter's
    seed: int | None = None


PLAIN = Form("moments in fp32")
MASTER = Form("master in fp32", master=True)
SAME = Form("moments as the parameter", moments=None)
STOCHASTIC = Form("rounded stochastically", moments=None, seed=5)
EIGHT_BITS = Form("moments in 8 bits", master=True, moments=torch.uint8)
FORMS = (PLAIN, MASTER, SAME, STOCHASTIC, EIGHT_BITS)


def cases(large: bool) -> list[Case]:
    count = 1 << 26 if large else 1 << 20
    return [case(count, PLAIN, quick=True), case(count, MASTER), case(1023, SAME)]


def small_cases() -> list[Case]:
    """Sizes and forms for interpreters of GPU kernels."""
    return [case(1040, PLAIN, quick=True), case(1023, MASTER), case(63, SAME)]


def compiled_cases() -> list[Case]:
    """Parameters whose machine code is looked at."""
    return [case(4096, MASTER), case(4096, PLAIN), case(1023, SAME)]


def case(count: int, form: Form = PLAIN, quick: bool = False) -> Case:
    """One update of `count` parameters. The result is their new values, and the new moments, in one tensor."""

    def inputs(draw: Draw) -> Inputs:
        moments = form.moments is not None
        return {
            "param": draw.normal(count),
            "gradient": draw.normal(count),
            "exp_avg": draw.normal(count, fp32=moments),
            "exp_avg_sq": draw.normal(count, fp32=moments).square(),
        }

    def ours(param: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, backend: str) -> Tensor:
        new, *moments = (x.clone() for x in (param, exp_avg, exp_avg_sq))
        masters = [param.to(torch.float32, copy=True)] if form.master else None
        adamw(
            [new],
            [gradient],
            moments[:1],
            moments[1:],
            UPDATE,
            masters=masters,
            scale=_SCALE,
            backend=backend,
        )
        return torch.cat([new, *moments])

    return Case(
        name=form.name,
        shape=f"{count}",
        inputs=inputs,
        gradients=(),
        ours=ours,
        plain=plain,
        peer=Peer("torch._fused_adamw_", _torchs),
        quick=quick,
    )


def state(count: int, form: Form, dtype: torch.dtype, seed: int = 1) -> dict[str, list]:
    """What adamw takes by name: a parameter of `dtype` after some updates, with what its form keeps beside it."""
    draw = Draw("cpu", dtype, seed)
    weight = draw.normal(count, fp32=True)
    gradient = draw.normal(count) * 10 ** draw.normal(count, fp32=True).to(dtype)
    if form.moments == torch.uint8:
        moments: list[Tensor | Blocks] = [
            zero_blocks(weight, signed=True),
            zero_blocks(weight, signed=False),
        ]
    else:
        kept = dtype if form.moments is None else form.moments
        moments = [
            (draw.normal(count) * 0.1).to(kept),
            (draw.normal(count, fp32=True).square() * 0.01).to(kept),
        ]
    return {
        "params": [weight.to(dtype)],
        "gradients": [gradient],
        "exp_avgs": moments[:1],
        "exp_avg_sqs": moments[1:],
        "masters": [weight.clone()] if form.master else [],
    }


def plain(param: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    """The formula, in fp32 or float64, rounded to what the inputs are."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    beta1, beta2 = UPDATE.betas
    g = gradient.to(wide) * _SCALE
    m = exp_avg.to(wide) * beta1 + g * (1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + g * g * (1 - beta2)
    root = (v / (1 - beta2**UPDATE.step)).sqrt() + UPDATE.eps
    decayed = param.to(wide) * (1 - UPDATE.lr * UPDATE.weight_decay)
    new = decayed - UPDATE.lr / (1 - beta1**UPDATE.step) * m / root
    return torch.cat([new.to(param.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)])


def _torchs(param: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    new, m, v = (x.clone() for x in (param, exp_avg.to(param.dtype), exp_avg_sq.to(param.dtype)))
    fused([new], [gradient], [m], [v])
    return torch.cat([new, m, v])


def fused(
    params: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]
) -> None:
    """torch's fused update, of tensors of one dtype."""
    torch._fused_adamw_(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(float(UPDATE.step)) for _ in params],
        lr=UPDATE.lr,
        beta1=UPDATE.betas[0],
        beta2=UPDATE.betas[1],
        weight_decay=UPDATE.weight_decay,
        eps=UPDATE.eps,
        amsgrad=False,
        maximize=False,
    )
