"""Recomputation and the loss scale of fp16 as code that a user compiles; see cases.py."""

import torch
from torch import nn

import pypar
from tests.compiled.cases import WIDTH, case, numbers, of_x
from tests.compiled.engines import seeded


@case("pypar.recomputation.recompute", "pypar.recomputation.SavedBytes")
def _recompute(axis):
    layers = seeded(
        lambda: nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
    )
    model = pypar.recompute(nn.ModuleDict({"layers": layers}))

    def run(x):
        for layer in model["layers"]:
            x = layer(x)
        return x

    return of_x(run, model)


@case("pypar.recomputation.offload_activations")
def _offload_activations(axis):
    layers = seeded(
        lambda: nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
    )
    model = pypar.offload_activations(nn.ModuleDict({"layers": layers}), min_bytes=1)

    def run(x):
        for layer in model["layers"]:
            x = layer(x)
        return x

    return of_x(run, model)


@case("pypar.recomputation.plan_activations")
def _plan_activations(axis):
    layers = seeded(
        lambda: nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
    )
    model = nn.ModuleDict({"layers": layers})
    pypar.plan_activations(model, "1MB", min_bytes=1)

    def run(x):
        for layer in model["layers"]:
            x = layer(x)
        return x

    return of_x(run, model)


@case("pypar.GradScaler")
def _grad_scaler(axis):
    weight = nn.Parameter(torch.ones(2, WIDTH))
    optimizer = pypar.AdamW([weight], lr=0.1, betas=(0.0, 0.0))

    def run(x):
        scaler = pypar.GradScaler(axis, "cpu", init_scale=4.0)
        with torch.no_grad():
            weight.fill_(1.0)
        weight.grad = scaler.scale(x.sum(1).detach()).sin()
        scaler.step(optimizer)
        scaler.update()
        return weight.detach() * scaler.get_scale()

    return run, lambda length: (numbers(2, length, WIDTH),), None


@case("pypar.recomputation.tiled")
def _tiled(axis):
    module = seeded(
        lambda: nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Linear(3 * WIDTH, WIDTH))
    )
    return of_x(pypar.tiled(module, 2), module)
