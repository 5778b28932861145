"""Parameters of a model that is cut, in a user's script: right for the whole tensor, or refused by a sentence."""

import math

import torch
from torch import nn

from pypar.layout import local_tensor
from pypar.mesh import Mesh
from pypar.sharded import Sharded
from pypar.tensor_parallel import ColumnParallelLinear
from tests.sharded.cases import assert_same, full, pair

# ---- elementwise

ELEMENTWISE = {
    "scalars": lambda p: 2 - (p * 3 + 1) / 2**0.5,
    "powers": lambda p: (p.abs() + 1) ** 0.5 + 2**p + p.pow(2).sqrt().exp().log1p(),
    "whole tensor": lambda p: p + torch.linspace(0, 1, p.numel()).view(p.shape),
    "broadcast": lambda p: (
        p * torch.arange(p.shape[-1]) + torch.linspace(0, 1, len(p)).view(-1, *[1] * (p.dim() - 1))
    ),
    "comparison": lambda p: torch.where(p > 0, p, torch.zeros_like(p)) + (p == p).to(p.dtype),
    "clamp": lambda p: p.clamp(-0.1, 0.1).lerp(torch.ones(p.shape), 0.25).addcmul(p, p, value=0.5),
    "in place": lambda p: p.detach().clone().mul_(2).add_(torch.ones(p.shape), alpha=3).clamp_(max=1),
    "iops": lambda p: _iops(p.detach().clone()),
    "copy": lambda p: torch.empty_like(p).copy_(torch.linspace(0, 1, p.numel()).view(p.shape)),
    "all of it": lambda p: _assign(p.detach().clone()),
    "foreach": lambda p: torch._foreach_add([p.detach()], [torch.full(p.shape, 2.0)])[0],
    "dtypes": lambda p: p.double().to(torch.bfloat16).float(),
    "mask": lambda p: _mask(p.detach().clone()),
    "out": lambda p: torch.maximum(p.detach(), -p.detach(), out=torch.empty_like(p)),
}


def _iops(x):
    x += 1
    x *= 2
    x /= 3
    x -= torch.ones(x.shape)
    return x


def _mask(x):
    x[x > 0] = 5.0
    return x.masked_fill(x < -0.1, 0)


def _assign(x):
    x[:] = torch.linspace(0, 1, x.numel()).view(x.shape)
    x[...] = x[:] * 2
    return x


def run_elementwise():
    whole, cut = pair()
    for name, compute in ELEMENTWISE.items():
        ours, theirs = ([compute(p) for p in m.parameters()] for m in (cut, whole))
        types = [type(x) is Sharded for x in ours]
        assert types == [type(p) is Sharded for p in cut.parameters()], name
        assert_same(ours, theirs, rtol=1e-6, atol=1e-7)
    return sum(types)


def test_elementwise_operations_act_on_the_whole(ranks):
    assert ranks(2, run_elementwise) == [5, 5]


# ---- reductions

REDUCTIONS = {
    "sum of squares": lambda g: sum(x.pow(2).sum() for x in g),
    "sum of norms": lambda g: sum(x.norm() ** 2 for x in g).sqrt(),
    "foreach": lambda g: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)), 2),
    "foreach 1": lambda g: torch.stack(torch._foreach_norm(g, 1.0)).sum(),
    "foreach inf": lambda g: torch.stack(torch._foreach_norm(g, math.inf)).max(),
    "norm 1": lambda g: sum(torch.norm(x, 1) for x in g),
    "norm 3": lambda g: sum(torch.linalg.vector_norm(x, 3) for x in g),
    "norm inf": lambda g: max(x.norm(float("inf")) for x in g),
    "frobenius": lambda g: sum(torch.linalg.norm(x) for x in g),
    "all dims": lambda g: sum(x.square().sum(tuple(range(x.dim()))) for x in g),
    "mean": lambda g: sum(x.mean() for x in g),
    "root mean square": lambda g: sum(x.norm() / x.numel() ** 0.5 for x in g),
    "spread": lambda g: sum(x.std() + x.var(unbiased=False) for x in g),
    "extremes": lambda g: sum(x.max() - x.amin() + x.abs().max() for x in g),
    "verdicts": lambda g: sum((x == x).all() + x.isnan().any() + (x > 0).any() for x in g),
    "counts": lambda g: sum(x.count_nonzero() + (x > 0).sum() for x in g),
    "equal": lambda g: sum(torch.equal(x, x.clone()) + torch.allclose(x, x + 1) for x in g),
    "dot": lambda g: sum(torch.dot(x, x) for x in g if x.dim() == 1),
}


def run_reductions():
    whole, cut = pair()
    for name, reduce in REDUCTIONS.items():
        ours, theirs = (reduce([p.grad for p in m.parameters()]) for m in (cut, whole))
        assert type(ours) is type(theirs), name
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    return float(ours)


def test_reductions_give_the_whole_tensors_value(ranks):
    assert len(set(ranks(2, run_reductions))) == 1


def run_one_bad_number(value):
    _, cut = pair()
    if torch.distributed.get_rank() == 1:
        local_tensor(cut.up.weight.grad)[0, 0] = value
    grad = cut.up.weight.grad
    return [
        str(float(x))
        for x in (grad.norm(), grad.max(), grad.isfinite().all(), grad.norm(math.inf), grad.sum())
    ]


def test_what_is_not_finite_on_one_rank_is_seen_by_all(ranks):
    for found in ranks(2, run_one_bad_number, math.nan):
        assert found == ["nan", "nan", "0.0", "nan", "nan"]
    for found in ranks(2, run_one_bad_number, math.inf):
        assert found == ["inf", "inf", "0.0", "inf", "inf"]


PENALTIES = {
    "squares": lambda p: p.square().sum(),
    "norm": lambda p: p.norm(),
    "norm 1": lambda p: p.norm(1),
    "mean": lambda p: p.abs().mean(),
    "variance": lambda p: p.var(),
    "learned scale": lambda p: _learned_scale(p),
    "whole": lambda p: (p.full_tensor() if isinstance(p, Sharded) else p).cumsum(0).pow(2).sum(),
    "norm of zeros": lambda p: (0 * p).norm(),
}


def _learned_scale(p):
    """Its own gradient would be of one rank's part."""
    scale = torch.linspace(1, 2, p.numel()).view(p.shape).requires_grad_()
    factor = torch.tensor(3.0, requires_grad=True)
    loss = (factor * p * scale).square().sum()
    for gradient in torch.autograd.grad(loss, (factor, scale), create_graph=True):
        loss = loss + gradient.sum()
    return loss


def run_penalties():
    whole, cut = pair()
    for name, penalty in PENALTIES.items():
        for model in (whole, cut):
            model.zero_grad()
            sum(penalty(p) for p in model.parameters()).backward()
        for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(ours.grad), theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (
        torch.autograd.grad(sum(p.pow(2).sum() for p in m.parameters()), list(m.parameters()))
        for m in (cut, whole)
    )
    assert_same(ours, theirs)
    seen = []
    cut.up.weight.register_hook(lambda grad: seen.append(grad.norm()) or 2 * grad)
    whole.up.weight.register_hook(lambda grad: seen.append(grad.norm()) or 2 * grad)
    for model in (cut, whole):
        model.zero_grad()
        model.up.weight.square().sum().backward()
    assert_same([cut.up.weight.grad], [whole.up.weight.grad])
    torch.testing.assert_close(*seen)


def test_penalties_on_parameters_have_the_whole_models_gradients(ranks):
    ranks(2, run_penalties)


# ---- first values

FILLS = {
    "normal_": lambda p: p.data.normal_(0.5, 0.1),
    "uniform_": lambda p: nn.init.uniform_(p, -1, 2),
    "init.normal_": lambda p: nn.init.normal_(p, std=0.02),
    "constant_": lambda p: nn.init.constant_(p, 0.3),
    "kaiming_uniform_": lambda p: nn.init.kaiming_uniform_(p, a=5**0.5),
    "kaiming_normal_": lambda p: nn.init.kaiming_normal_(p),
    "xavier_uniform_": lambda p: nn.init.xavier_uniform_(p),
    "xavier_normal_": lambda p: nn.init.xavier_normal_(p),
    "trunc_normal_": lambda p: nn.init.trunc_normal_(p, std=0.5, a=-0.5, b=0.5),
    "orthogonal_": lambda p: nn.init.orthogonal_(p),
    "ones_": lambda p: nn.init.ones_(p),
    "exponential_": lambda p: p.data.exponential_(),
    "bernoulli_": lambda p: p.data.bernoulli_(0.3),
    "randn_like": lambda p: p.data.add_(torch.randn_like(p)),
    "generator": lambda p: p.data.normal_(generator=torch.Generator().manual_seed(int(p.numel()))),
}


def run_fills():
    whole, cut = pair()
    for name, fill in FILLS.items():
        for model in (whole, cut):
            torch.manual_seed(7)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    fill(parameter)
        for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
            assert torch.equal(full(ours), theirs), name
    linear = nn.Linear(4, 2)
    assert nn.init._calculate_fan_in_and_fan_out(ColumnParallelLinear(4, 2, Mesh(tp=2).tp).weight) == (4, 2)
    return linear.weight.shape


def test_random_first_values_are_parts_of_the_wholes(ranks):
    ranks(2, run_fills)
