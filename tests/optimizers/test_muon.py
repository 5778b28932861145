"""pypar.Muon: torch's on matrices; stacks, fused weights and cut weights are their matrices one by one."""

import pytest
import torch

import pypar
from pypar.optimizers.muon import orthogonal
from pypar.sharded import Sharded
from tests.sharded.cases import assert_same, backward, pair

SHAPES = [(6, 10), (10, 6), (8, 8)]


def _parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _steps(optimizer, params, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1, "ns_steps": 3},
    ],
)
def test_the_bits_are_torchs_and_so_is_the_state(options):
    ours, torchs = _parameters(*SHAPES), _parameters(*SHAPES)
    optimizer, other = pypar.Muon(ours, **options), torch.optim.Muon(torchs, **options)
    _steps(optimizer, ours)
    _steps(other, torchs)
    for mine, its in zip(ours, torchs, strict=True):
        assert torch.equal(mine, its)
    fresh, fresh_torchs = pypar.Muon(ours, lr=1.0), torch.optim.Muon(torchs, lr=1.0)
    fresh.load_state_dict(other.state_dict())
    fresh_torchs.load_state_dict(optimizer.state_dict())
    _steps(fresh, ours)
    _steps(fresh_torchs, torchs)
    for mine, its in zip(ours, torchs, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_is_its_matrices(shape):
    (stack,) = _parameters((3, *shape))
    parts = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    whole, apart = pypar.Muon([stack], lr=0.1), pypar.Muon(parts, lr=0.1)
    for step in range(3):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        for part, gradient in zip(parts, stack.grad, strict=True):
            part.grad = gradient
        whole.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([x.detach() for x in parts]), rtol=0, atol=4e-3)


def test_a_fused_weight_is_its_matrices():
    (fused,) = _parameters((16, 8))
    rows = [8, 4, 4]
    parts = [torch.nn.Parameter(x.clone()) for x in fused.detach().split(rows)]
    whole, apart = pypar.Muon([{"params": [fused], "rows": rows}], lr=0.1), pypar.Muon(parts, lr=0.1)
    for step in range(3):
        fused.grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(step))
        for part, gradient in zip(parts, fused.grad.split(rows), strict=True):
            part.grad = gradient
        whole.step()
        apart.step()
    assert torch.equal(fused, torch.cat([x.detach() for x in parts]))


def test_singular_values_come_near_one():
    group = pypar.Muon(_parameters((4, 4))).param_groups[0]
    found = torch.linalg.svdvals(
        orthogonal(torch.randn(40, 24, generator=torch.Generator().manual_seed(1)), group).float()
    )
    assert found.min() > 0.3 and found.max() < 1.6
    assert torch.equal(orthogonal(torch.zeros(3, 5), group), torch.zeros(3, 5).bfloat16())


def _run_cut():
    whole, cut = pair()
    matrices = [[p for p in model.parameters() if p.dim() == 2] for model in (whole, cut)]
    optimizers = [pypar.Muon(params, lr=0.1) for params in matrices]
    for step in range(2):
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert sum(isinstance(p, Sharded) for p in matrices[1]) == 4
    assert_same(cut, whole, 0, 5e-3)  # the iteration is in bf16, and its steps are 0.1 long
    state = optimizers[1].state[matrices[1][0]]["momentum_buffer"]
    assert state.shape == matrices[0][0].shape and isinstance(state, Sharded)


def test_a_weight_that_is_cut_is_made_orthogonal_as_a_whole(ranks):
    ranks(2, _run_cut)


@pytest.mark.parametrize(
    ("shapes", "options", "sentence"),
    [
        ([(4,)], {}, r"not a parameter \(4,\).*give vectors and embeddings to AdamW"),
        ([(2, 3, 4, 5)], {}, "not a parameter"),
        ([(6, 4)], {"rows": [3, 2]}, r"rows \(3, 2\) add up to 5, and the weight \(6, 4\) has 6"),
        ([(6, 4)], {"lr": -1.0}, "lr .* must be at least 0"),
        ([(6, 4)], {"adjust_lr_fn": "other"}, "adjust_lr_fn .'other'. must be one of"),
    ],
)
def test_what_it_cannot_take_is_named(shapes, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pypar.Muon(_parameters(*shapes), **options)
