"""Optimizers whose states lie on a disk give the bits of those in memory, and hold no state between updates."""

from functools import partial

import pytest
import torch

import pypar

SHAPES = ((63, 111), (5,), (0, 3), (128, 300), (7, 7, 7), (1,), (300, 70))
MAKES = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "fused AdamW": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "pypar": partial(pypar.AdamW, lr=1e-2),
    "pypar in 8 bits": partial(pypar.AdamW, lr=1e-2, moments=torch.uint8),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params, step):
    """A matrix has its first gradient later than the others."""
    generator = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if index == 3 and step < 2 else gradient


def groups_of(params):
    return [{"params": params[:4]}, {"params": params[4:], "lr": 3e-3}]


def steps(optimizers, of_params, numbers):
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda k: 0.9**k) for each in optimizers]
    for k in numbers:
        for params, optimizer, schedule in zip(of_params, optimizers, schedules, strict=True):
            give_gradients(params, k)
            optimizer.step()
            schedule.step()
    for x, y in zip(*of_params, strict=True):
        assert torch.equal(x, y)


def held_bytes(optimizer):
    tensors = [
        x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor) and x.dim()
    ]
    assert tensors
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("part_bytes", [1, 64 << 10, 1 << 30])
def test_bits_are_those_of_the_optimizer_in_memory(name, part_bytes, tmp_path):
    plain, ours = parameters(), parameters()
    whole = MAKES[name](groups_of(plain))
    on_disk = pypar.OnDisk(MAKES[name], groups_of(ours), tmp_path, part_bytes=part_bytes)
    steps([whole, on_disk], [plain, ours], range(4))
    assert held_bytes(on_disk) == 0 < held_bytes(whole) <= on_disk.disk_bytes
    assert on_disk.buffer_bytes <= 3 * max(part_bytes, 8 * 128 * 300 + 3 * 4096) * 1.1


@pytest.mark.parametrize("name", ["AdamW", "pypar in 8 bits"])
def test_states_are_saved_and_loaded(name, tmp_path):
    plain, ours = parameters(), parameters()
    whole = MAKES[name](plain)
    on_disk = pypar.OnDisk(MAKES[name], ours, tmp_path, part_bytes=64 << 10)
    steps([whole, on_disk], [plain, ours], range(3))
    saved, expected = on_disk.state_dict(), whole.state_dict()
    torch.testing.assert_close(saved["state"], expected["state"], rtol=0, atol=0)
    assert held_bytes(on_disk) == 0
    loaded = pypar.OnDisk(MAKES[name], ours, tmp_path, part_bytes=1)
    loaded.load_state_dict(expected)
    again = MAKES[name](plain)
    again.load_state_dict(saved)  # and the other way
    steps([again, loaded], [plain, ours], range(3, 5))


def test_a_closure_and_a_new_group(tmp_path):
    plain, ours = parameters(), parameters()
    whole = torch.optim.AdamW(plain[:3], lr=0.1)
    on_disk = pypar.OnDisk(partial(torch.optim.AdamW, lr=0.1), ours[:3], tmp_path)
    for optimizer, params in ((whole, plain), (on_disk, ours)):
        give_gradients(params, 5)
        assert optimizer.step(lambda: 7.5) == 7.5
        optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
        give_gradients(params, 6)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(x, y) and y.grad is None for x, y in zip(plain, ours, strict=True))


def test_a_scaler_of_gradients_reaches_the_optimizer(tmp_path):
    plain, ours = parameters(), parameters()
    whole = pypar.AdamW(plain, lr=0.1)
    on_disk = pypar.OnDisk(partial(pypar.AdamW, lr=0.1), ours, tmp_path, part_bytes=1)
    for step, found in ((5, 0.0), (6, 1.0), (7, 0.0)):
        for optimizer, params in ((whole, plain), (on_disk, ours)):
            give_gradients(params, step)
            before = [p.detach().clone() for p in params]
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
            optimizer.step()
            assert all(map(torch.equal, before, params)) == bool(found)
    assert all(map(torch.equal, plain, ours))


def test_what_cannot_be_is_refused(tmp_path):
    make = partial(torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match="is not there"):
        pypar.OnDisk(make, parameters(), tmp_path / "none")
    with pytest.raises(ValueError, match=r"part_bytes \(0\) must be positive"):
        pypar.OnDisk(make, parameters(), tmp_path, part_bytes=0)
