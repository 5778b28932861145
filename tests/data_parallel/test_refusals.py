"""What pypar.DataParallel refuses, and what stands when something went wrong."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_module

import pypar
from pypar.data_parallel import DataParallel
from pypar.mesh import Axis
from tests.harness.refusals import sentences


def run_refusals():
    axis = Axis.of(dist.group.WORLD)
    model = DataParallel(nn.Linear(3, 2), axis)
    said = sentences(
        lambda: model.join(),
        lambda: copy.deepcopy(model),
        lambda: DataParallel(model, axis),
        lambda: DataParallel(nn.Sequential(nn.ReLU(), model), axis),
        lambda: DataParallel(model.module, axis),
        lambda: DataParallel(nn.ReLU(), axis),
        lambda: DataParallel(nn.LazyLinear(3), axis),
        lambda: DataParallel(nn.Linear(3, 2), axis, comm_dtype=torch.float64),
        lambda: DataParallel(nn.Linear(3, 2), axis, power_sgd_rank=1.5),
        lambda: DataParallel(nn.Linear(3, 2), 0),
        lambda: DataParallel(nn.Linear(3, 2).forward, axis),
        lambda: DataParallel(distribute_module(nn.Linear(3, 2), DeviceMesh("cpu", [0, 1])), axis),
        lambda: DataParallel(nn.Linear(3, 2 + axis.rank), axis),
        lambda: model.load_state_dict(model.state_dict(), assign=True),
        lambda: pypar.GradientBuckets([nn.Parameter(torch.ones(3)) * 2], axis),
    )
    model.close()
    DataParallel(model.module, axis)
    return said


def test_refusals_are_sentences(ranks):
    expected = [
        "every rank must run the same number of steps",
        "copy model.module and wrap the copy",
        "the module is a DataParallel already",
        "its part '1' is a DataParallel already",
        "parameter 0 (2, 3) has gradient buckets already",
        "no parameter that requires a gradient",
        "parameter 'weight' has no shape yet",
        "comm_dtype (torch.float64) must be",
        "power_sgd_rank (1.5) must be a positive whole number",
        "or a torch.distributed ProcessGroup, not 0",
        "wraps a torch.nn.Module, not a method",
        "parameter 'weight' is a DTensor",
        "the models are not the same on all 2 ranks",
        "load_state_dict(assign=True) would replace",
        "was computed from other tensors",
    ]
    for found, wanted in zip(ranks(2, run_refusals)[0], expected, strict=True):
        assert wanted in found
    with pytest.raises(ValueError, match="init_process_group"):
        DataParallel(nn.Linear(1, 1))


# ---- use that would give wrong gradients


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        raise ArithmeticError("in backward")


def run_wrong_use(way):
    model = DataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), Axis.of(dist.group.WORLD))
    first, second = model.module
    x = torch.ones(3)
    with pytest.raises(RuntimeError) as error:
        if way == "closed":
            model.close()
            with torch.no_grad():
                model(x)
            model(x)
        elif way == "after an error":
            with pytest.raises(ArithmeticError):
                second(Fails.apply(first(x))).sum().backward()
            model(x)
        else:
            model(x).square().sum().backward(create_graph=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("closed", "was closed and reduces nothing"),
        ("after an error", "an earlier backward ended with an error"),
        ("create_graph", "was made with create_graph=True"),
    ],
)
def test_wrong_use_is_an_error(ranks, way, sentence):
    assert all(sentence in message for message in ranks(2, run_wrong_use, way))


def run_frozen_in_mid_training():
    """Two layers, the first frozen after two steps: its weights before and after two more."""
    group = dist.new_group(backend="pypar")
    torch.manual_seed(0)
    model = DataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    frozen, trained = model.module
    weights = []
    for step in range(4):
        frozen.requires_grad_(step < 2)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        weights.append((frozen.weight.detach().clone(), trained.weight.detach().clone()))
    return weights


def test_frozen_parameters_stay_where_they_are(ranks):
    """Neither weight decay nor momentum moves them, and the rest is trained alike on all ranks."""
    first, second = ranks(2, run_frozen_in_mid_training)
    for ours, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, theirs))
    frozen, trained = zip(*first, strict=True)
    assert torch.equal(frozen[1], frozen[3]) and not torch.equal(frozen[0], frozen[1])
    assert not torch.equal(trained[2], trained[3])
