"""pypar.AdamW: torch's on its own terms, and what it keeps beside torch's."""

import copy

import pytest
import torch

import pypar
from tests.sharded.cases import assert_same, backward, pair

BF16, EIGHT_BITS = torch.bfloat16, torch.uint8


def _parameters(dtype=torch.float32, shapes=((70, 80), (7,))):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _steps(optimizer, steps=range(3)):
    for step in steps:
        generator = torch.Generator().manual_seed(10 + step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def _equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True, "betas": (0.4, 0.9)}, {"weight_decay": 0.0, "foreach": True}, {"fused": True}],
)
def test_it_is_torchs(options):
    ours, torchs = _parameters(), _parameters()
    for make, params in ((pypar.AdamW, ours), (torch.optim.AdamW, torchs)):
        _steps(make([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], lr=0.01, **options))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_its_state_loads_into_torchs_and_back(dtype):
    ours, torchs = _parameters(dtype), _parameters(dtype)
    optimizer, other = pypar.AdamW(ours, lr=0.01), torch.optim.AdamW(torchs, lr=0.02)
    _steps(optimizer)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.01
    for a, b in zip(ours, torchs, strict=True):
        b.data.copy_(a.data)
        assert optimizer.state[a].keys() == other.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[a][name], x) for name, x in other.state[b].items())
    back = pypar.AdamW(torchs, lr=0.03)
    back.load_state_dict(copy.deepcopy(other.state_dict()))
    _steps(optimizer, [3])
    _steps(back, [3])
    assert _equal(ours, torchs)


KEPT = {
    "masters": {"master_weights": True},
    "bf16 moments": {"master_weights": True, "moments": BF16},
    "8 bits": {"master_weights": True, "moments": EIGHT_BITS},
    "stochastic": {"stochastic_rounding": True, "seed": 3},
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_going_on_from_its_state_changes_no_bit(options, tmp_path):
    params = _parameters(BF16)
    optimizer = pypar.AdamW(params, lr=0.01, **options)
    _steps(optimizer)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    torch.save(optimizer.state_dict(), tmp_path / "state")
    _steps(optimizer, range(3, 6))
    other = pypar.AdamW(others, lr=0.5, **options)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    _steps(other, range(3, 6))
    assert _equal(params, others)


def test_masters_are_fp32_training_that_parameters_are_copies_of():
    wide, narrow = _parameters(), _parameters(BF16)
    for a, b in zip(wide, narrow, strict=True):
        a.data.copy_(b.data)
    optimizer, plain = pypar.AdamW(narrow, lr=1e-3, master_weights=True), pypar.AdamW(wide, lr=1e-3)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(wide, narrow, strict=True):
            b.grad = torch.randn(b.shape, generator=generator).to(BF16)
            a.grad = b.grad.float()
        optimizer.step()
        plain.step()
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(optimizer.state[b]["master"], a) and torch.equal(b, a.to(BF16))


def test_8_bits_are_for_large_parameters_and_convert_both_ways():
    params = _parameters()
    optimizer = pypar.AdamW(params, lr=0.01, moments=EIGHT_BITS)
    _steps(optimizer)
    large, small = (optimizer.state[p] for p in params)
    assert large["exp_avg_codes"].dtype == EIGHT_BITS and large["exp_avg_absmax"].numel() == 22
    assert small["exp_avg"].dtype == torch.float32
    wide = pypar.AdamW(params, lr=0.01)
    wide.load_state_dict(optimizer.state_dict())
    torch.optim.AdamW(params).load_state_dict(wide.state_dict())
    exact = pypar.AdamW(_parameters(), lr=0.01)
    _steps(exact)
    found, expected = wide.state[params[0]], next(iter(exact.state.values()))
    for name in ("exp_avg", "exp_avg_sq"):
        assert (found[name] - expected[name]).abs().max() < 0.02 * expected[name].abs().max()
    again = pypar.AdamW(params, lr=0.01, moments=EIGHT_BITS)
    again.load_state_dict(exact.state_dict())
    assert again.state[params[0]]["exp_avg_codes"].shape == params[0].shape


def test_the_gradient_scaler_leaves_its_division_and_its_verdict_to_the_step():
    ours, torchs = _parameters(), _parameters()
    optimizer, other = pypar.AdamW(ours, lr=0.01), torch.optim.AdamW(torchs, lr=0.01, fused=True)
    for params, each in ((ours, optimizer), (torchs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            each.zero_grad()
            loss = sum((p * p).sum() for p in params) * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(each)
            scaler.update()
        assert all(each.state[p]["step"] == 2 for p in params)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_lies_otherwise_and_a_parameter_without_one():
    params, others = _parameters(), _parameters()
    for optimizer, (first, second) in ((pypar.AdamW(params), params), (torch.optim.AdamW(others), others)):
        first.grad = torch.linspace(-1, 1, first.numel()).view(80, 70).t()
        second.grad = None
        assert optimizer.step(lambda: 7) == 7
    torch.testing.assert_close(params[0], others[0])
    assert torch.equal(params[1], others[1])


def _run_cut():
    whole, cut = pair()
    optimizers = [pypar.AdamW(model.parameters(), lr=0.01) for model in (whole, cut)]
    for step in range(2):
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert_same(cut, whole)
    again = pypar.AdamW(cut.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for model, optimizer in zip((whole, cut), (optimizers[0], again), strict=True):
        optimizer.zero_grad()
        backward(model, 5)
        optimizer.step()
    assert_same(cut, whole)
    for options in ({"moments": EIGHT_BITS}, {"stochastic_rounding": True}):
        with pytest.raises(ValueError, match="is cut over ranks"):
            pypar.AdamW(cut.parameters(), **options)


def test_parameters_that_are_cut_over_ranks(ranks):
    ranks(2, _run_cut)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_what_it_lacks_is_named(name):
    with pytest.raises(ValueError, match=f"pypar.AdamW has no {name}"):
        pypar.AdamW(_parameters(), **{name: True})


def test_other_dtypes_of_moments_are_named():
    with pytest.raises(ValueError, match="moments=torch.float16 must be"):
        pypar.AdamW(_parameters(), moments=torch.float16)
