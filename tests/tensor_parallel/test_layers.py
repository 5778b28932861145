"""Column, row, embedding and loss over the tp axis: values and gradients of the dense layers, and what they
send."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pypar.layout import Cut, Layout, layout_of, local_shape, local_tensor
from pypar.mesh import Axis, Mesh
from pypar.selftest.judge import judge_result
from pypar.selftest.orders import InOrder
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)
from tests.harness.samples import draw, relative

WORLDS = [1, 2, 4]
SINGLE = Axis.single("tp")


# ---- a feed-forward block: two columns over one input, and the row that follows


def block_tensors(world_size, dtype=torch.float32):
    B, T, D, F = 3, 2 * world_size, 11, 7 * world_size
    shapes = {
        "x": (B, T, D),
        "gate": (F, D),
        "gate_bias": (F,),
        "up": (F, D),
        "down": (D, F),
        "down_bias": (D,),
    }
    tensors = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["dout"] = draw(B, T, D, seed=99)
    return {name: t.to(dtype) for name, t in tensors.items()}


def dense_block(tensors):
    leaf = {name: t.clone().requires_grad_() for name, t in tensors.items() if name != "dout"}
    gate = functional.linear(leaf["x"], leaf["gate"], leaf["gate_bias"])
    up = functional.linear(leaf["x"], leaf["up"])
    out = functional.linear(gate * up, leaf["down"], leaf["down_bias"])
    out.backward(tensors["dout"])
    return {"out": out.detach()} | {f"d{name}": t.grad for name, t in leaf.items()}


def make_block(axis, tensors, sequence_parallel):
    (F, D), dtype = tensors["gate"].shape, tensors["gate"].dtype
    options = {"sequence_parallel": sequence_parallel, "dtype": dtype}
    gate = ColumnParallelLinear(D, F, axis, bias=True, **options)
    up = ColumnParallelLinear(D, F, axis, **options)
    down = RowParallelLinear(F, D, axis, bias=True, **options)
    parts = {
        "gate": gate.weight,
        "gate_bias": gate.bias,
        "up": up.weight,
        "down": down.weight,
        "down_bias": down.bias,
    }
    with torch.no_grad():
        for name, parameter in parts.items():
            parameter.copy_(tensors[name])
    return parts, gate, up, down


def run_block(world_size, dtype, sequence_parallel):
    axis = Mesh(tp=world_size).tp
    tensors = block_tensors(world_size, dtype)
    parts, gate, up, down = make_block(axis, tensors, sequence_parallel)
    x, dout = tensors["x"], tensors["dout"]
    if sequence_parallel:
        x, dout = (t.chunk(world_size, 1)[axis.rank] for t in (x, dout))
    x = x.clone().requires_grad_()
    gated, upped = column_parallel(
        x, (gate.weight, up.weight), axis, sequence_parallel=sequence_parallel, biases=(gate.bias, None)
    )
    out = down(gated * upped)
    out.backward(dout)
    return {"out": out.detach(), "dx": x.grad} | {
        f"d{name}": local_tensor(p.grad) for name, p in parts.items()
    }


def assemble(results, sequence_parallel):
    dims = {"dgate": 0, "dgate_bias": 0, "dup": 0, "ddown": 1}
    if sequence_parallel:
        dims |= {"out": 1, "dx": 1}
    whole = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name in dims:
            whole[name] = torch.cat(parts, dims[name])
        elif name == "ddown_bias" and sequence_parallel:
            whole[name] = sum(parts)  # as the layout's sum_over says
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"ranks differ in {name}"
            whole[name] = parts[0]
    return whole


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_block_equals_dense_layers(ranks, world_size, sequence_parallel):
    results = ranks(world_size, run_block, world_size, torch.float32, sequence_parallel)
    exact = dense_block({name: t.double() for name, t in block_tensors(world_size).items()})
    for name, actual in assemble(results, sequence_parallel and world_size > 1).items():
        assert relative(actual, exact[name]) < 1e-6, name


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_block_in_bf16_obeys_the_error_rule(ranks, world_size, sequence_parallel):
    results = ranks(world_size, run_block, world_size, torch.bfloat16, sequence_parallel)
    tensors = block_tensors(world_size, torch.bfloat16)
    with InOrder(0):
        peer = dense_block(tensors)
    exact = dense_block({name: t.double() for name, t in tensors.items()})
    for name, actual in assemble(results, sequence_parallel).items():
        judge_result(name, actual, [peer[name]], exact[name], gradient=name != "out").check()


# ---- gathered output


def run_gathered(world_size):
    axis = Mesh(tp=world_size).tp
    torch.manual_seed(7)
    layer = ColumnParallelLinear(5, 3 * world_size, axis, bias=True, gather_output=True)
    x = draw(2, 3, 5, seed=1).requires_grad_()
    out = layer(x)
    (out * draw(2, 3, 3 * world_size, seed=2)).sum().backward()
    return out.detach(), x.grad, local_tensor(layer.weight.grad), local_tensor(layer.bias.grad)


@pytest.mark.parametrize("world_size", WORLDS)
def test_gathered_output_equals_linear(ranks, world_size):
    torch.manual_seed(7)
    layer = nn.Linear(5, 3 * world_size)
    x = draw(2, 3, 5, seed=1).requires_grad_()
    out = layer(x)
    (out * draw(2, 3, 3 * world_size, seed=2)).sum().backward()
    results = ranks(world_size, run_gathered, world_size)
    for actual_out, dx, _, _ in results:
        assert relative(actual_out, out) < 1e-6 and relative(dx, x.grad) < 1e-6
    assert relative(torch.cat([r[2] for r in results]), layer.weight.grad) < 1e-6
    assert relative(torch.cat([r[3] for r in results]), layer.bias.grad) < 1e-6


# ---- parameters: first values, layouts


def run_first_values(world_size):
    axis = Mesh(tp=world_size).tp
    torch.manual_seed(3)
    layers = (
        ColumnParallelLinear(6, 8, axis, bias=True),
        RowParallelLinear(8, 6, axis, bias=True),
        VocabParallelEmbedding(12, 5, axis, padding_idx=-2),
    )
    generator = torch.Generator().manual_seed(11)
    layers[0].reset_parameters(generator)
    return [local_tensor(p).detach() for layer in layers for p in layer.parameters()]


@pytest.mark.parametrize("world_size", WORLDS)
def test_first_values_are_those_of_torchs_layers_in_every_layout(ranks, world_size):
    torch.manual_seed(3)
    column_layer, row_layer, embedding = nn.Linear(6, 8), nn.Linear(8, 6), nn.Embedding(12, 5, padding_idx=10)
    torch.manual_seed(11)
    column_layer = nn.Linear(6, 8)
    results = ranks(world_size, run_first_values, world_size)
    column_weight, column_bias, row_weight, row_bias, table = zip(*results, strict=True)
    assert torch.equal(torch.cat(column_weight), column_layer.weight)
    assert torch.equal(torch.cat(column_bias), column_layer.bias)
    assert torch.equal(torch.cat(row_weight, 1), row_layer.weight)
    assert all(torch.equal(bias, row_layer.bias) for bias in row_bias)
    assert torch.equal(torch.cat(table), embedding.weight)


def run_layouts(sequence_parallel):
    mesh = Mesh(tp=2)
    options = {"sequence_parallel": sequence_parallel}
    layers = nn.ModuleList(
        [
            ColumnParallelLinear(6, 8, mesh.tp, bias=True, **options),
            RowParallelLinear(8, 6, mesh.tp, bias=True, **options),
            VocabParallelEmbedding(12, 5, mesh.tp, **options),
        ]
    )
    on_meta = nn.ModuleList([ColumnParallelLinear(6, 8, mesh.tp, bias=True, device="meta")]).to_empty(
        device="cpu"
    )
    copies = (layers, copy.deepcopy(layers), copy.deepcopy(layers).to(torch.bfloat16))
    layouts = [[layout_of(p) for p in module.parameters()] for module in copies]
    assert layouts[1] == layouts[0] and layouts[2] == layouts[0]
    assert [tuple(local_tensor(p).shape) for p in layers.parameters()] == [
        local_shape(each, mesh) for each in layouts[0]
    ]
    return layouts[0], [layout_of(p) for p in on_meta.parameters()]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
def test_parameters_carry_layouts_through_copies_and_moves(ranks, sequence_parallel):
    rows = (Cut(0, "tp"),)
    column_layouts = [Layout((8, 6), rows), Layout((8,), rows)]
    row_bias = Layout((6,), sum_over=("dp", "cp", "tp") if sequence_parallel else ("dp", "cp"))
    for layouts, from_meta in ranks(2, run_layouts, sequence_parallel):
        assert layouts == [
            *column_layouts,
            Layout((6, 8), (Cut(1, "tp"),)),
            row_bias,
            Layout((12, 5), rows),
        ]
        assert from_meta == column_layouts


def run_autocast():
    axis = Mesh(tp=2).tp
    first, second = ColumnParallelLinear(6, 8, axis, bias=True), RowParallelLinear(8, 6, axis, bias=True)
    x = draw(3, 6, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = second(first(x))
    out.sum().backward()
    return out.dtype, x.grad.dtype, first.weight.grad.dtype, second.bias.grad.dtype


def test_autocast_applies_as_to_torchs_linear(ranks):
    for dtypes in ranks(2, run_autocast):
        assert dtypes == (torch.bfloat16, torch.float32, torch.float32, torch.float32)


def test_one_rank_is_plain_linear():
    torch.manual_seed(1)
    layer = ColumnParallelLinear(6, 8, SINGLE, bias=True, sequence_parallel=True)
    x = draw(3, 6, seed=1)
    assert relative(layer(x), functional.linear(x, layer.weight, layer.bias)) < 1e-6
    assert "tp=1" in repr(layer)
