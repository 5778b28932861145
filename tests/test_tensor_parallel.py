"""Column, row, embedding and loss over the tp axis: values and gradients of the dense layers, and what they "
"send."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pypar.comm import wire_bytes
from pypar.layout import Layout, layout_of, local_shape
from pypar.mesh import Axis, Mesh
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column,
    column_parallel,
    vocab_parallel_cross_entropy,
)

WORLDS = [1, 2, 4]
SINGLE = Axis.single("tp")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual, expected):
    """Largest error as a share of the largest value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def within_twice(actual, peer, exact):
    """The project's error rule: at most twice the error of PyTorch in the same dtype, plus rounding of the "
    "dtype."""
    slack = 2 * ((peer + 0.3) - 0.3 - peer).abs().max().double()
    error, allowed = ((t.double() - exact.double()).abs().max() for t in (actual, peer))
    return bool(error <= 2 * allowed + slack)


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
            whole = tensors[name]
            for _, dim in layout_of(parameter).shards:
                whole = whole.chunk(axis.size, dim)[axis.rank]
            parameter.copy_(whole)
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
    return {"out": out.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in parts.items()}


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
            whole[name] = sum(parts)  # as the layout's gradient_sum_axes says
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
    peer = dense_block(tensors)
    exact = dense_block({name: t.double() for name, t in tensors.items()})
    for name, actual in assemble(results, sequence_parallel).items():
        assert actual.dtype == torch.bfloat16
        assert within_twice(actual, peer[name], exact[name]), name


# ---- what is sent, when, and what is not


def run_layer_traffic(world_size, sequence_parallel):
    """One transformer layer's linears: three columns and a row, two columns and a row."""
    axis = Mesh(tp=world_size).tp
    B, T, D, F = 2, 8, 8, 16
    options = {"sequence_parallel": sequence_parallel}
    columns = [ColumnParallelLinear(D, F, axis, **options).weight for _ in range(5)]
    rows = [RowParallelLinear(F, D, axis, **options) for _ in range(2)]
    x = draw(B, T // world_size if sequence_parallel else T, D, seed=1).requires_grad_()
    axis.traffic.reset()
    q, k, v = column_parallel(x, columns[:3], axis, **options)
    hidden = rows[0](q + k + v)
    gate, up = column_parallel(hidden, columns[3:], axis, **options)
    rows[1](gate * up).sum().backward()
    return axis.traffic.snapshot(), x.grad.nbytes * (world_size if sequence_parallel else 1)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_layer_sends_four_all_reduces(ranks, world_size):
    for traffic, hidden_bytes in ranks(world_size, run_layer_traffic, world_size, False):
        if world_size == 1:
            assert traffic.bytes_sent == 0 and not traffic.calls
        else:
            assert traffic.calls == {"all_reduce": 4}
            assert traffic.bytes_sent == 4 * wire_bytes("all_reduce", hidden_bytes, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_with_sequence_parallelism_gathers_six_times(ranks, world_size):
    """Forward: 2 gathers and 2 reduce-scatters. Backward: as many, and x of each column is gathered again."""
    for traffic, hidden_bytes in ranks(world_size, run_layer_traffic, world_size, True):
        assert traffic.calls == {"all_gather": 6, "reduce_scatter": 4}
        assert traffic.bytes_sent == 10 * wire_bytes("all_gather", hidden_bytes, world_size)


def run_recorded_backward(sequence_parallel):
    """The order of what column_parallel's backward starts, computes and waits for."""
    axis = Mesh(tp=2).tp
    weights = [draw(6, 8, seed=i).requires_grad_() for i in range(2)]
    x = draw(2, 4, 8, seed=3).requires_grad_()
    outs = column_parallel(x, weights, axis, sequence_parallel=sequence_parallel)
    events = []

    def recorded(name, function):
        def call(*args):
            events.append(name)
            result = function(*args)
            if not name.endswith("_start"):
                return result

            class Handle:
                def wait(self):
                    events.append(name.replace("_start", "_wait"))
                    return result.wait()

            return Handle()

        return call

    names = [
        n for n in vars(column) if n.endswith("_start") or n.endswith("_gradient") and n.startswith("linear")
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(column, name, recorded(name, getattr(column, name)))
        (outs[0] * outs[1]).sum().backward()
    return events


def test_the_input_gradient_is_reduced_while_weight_gradients_are_computed(ranks):
    for events in ranks(2, run_recorded_backward, False):
        assert events == [
            *["linear_input_gradient"] * 2,
            "all_reduce_start",
            *["linear_weight_gradient"] * 2,
            "all_reduce_wait",
        ]


def test_sequence_parallel_backward_hides_both_collectives(ranks):
    for events in ranks(2, run_recorded_backward, True):
        assert events == [
            "all_gather_start",
            *["linear_input_gradient"] * 2,
            "reduce_scatter_start",
            "all_gather_wait",
            *["linear_weight_gradient"] * 2,
            "reduce_scatter_wait",
        ]


def run_partial_gradients(sequence_parallel):
    axis = Mesh(tp=2).tp
    counts = []
    for needs_x, needs_weight in ((True, False), (False, True)):
        x = draw(2, 4, 8, seed=1).requires_grad_(needs_x)
        first = draw(6, 8, seed=2).requires_grad_(needs_weight)
        second = draw(6, 8, seed=3)
        out, unused = column_parallel(x, (first, second), axis, sequence_parallel=sequence_parallel)
        axis.traffic.reset()
        out.sum().backward()
        counts.append(
            (dict(axis.traffic.calls), x.grad is not None, first.grad is not None, second.grad is None)
        )
    return counts


def test_only_needed_gradients_are_computed_and_sent(ranks):
    for only_x, only_weight in ranks(2, run_partial_gradients, False):
        assert only_x == ({"all_reduce": 1}, True, False, True)
        assert only_weight == ({}, False, True, True)
    for only_x, only_weight in ranks(2, run_partial_gradients, True):
        assert only_x == ({"reduce_scatter": 1}, True, False, True)
        assert only_weight == ({"all_gather": 1}, False, True, True)


def run_gathered(world_size):
    axis = Mesh(tp=world_size).tp
    torch.manual_seed(7)
    layer = ColumnParallelLinear(5, 3 * world_size, axis, bias=True, gather_output=True)
    x = draw(2, 3, 5, seed=1).requires_grad_()
    out = layer(x)
    (out * draw(2, 3, 3 * world_size, seed=2)).sum().backward()
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad


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
    return [p.detach() for layer in layers for p in layer.parameters()]


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
    for module in (layers, copy.deepcopy(layers), copy.deepcopy(layers).to(torch.bfloat16)):
        layouts = [layout_of(p) for p in module.parameters()]
        assert all(tuple(p.shape) == local_shape(layout_of(p), mesh) for p in module.parameters())
    return layouts, [layout_of(p) for p in on_meta.parameters()]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
def test_parameters_carry_layouts_through_copies_and_moves(ranks, sequence_parallel):
    column_layouts = [Layout((8, 6), (("tp", 0),)), Layout((8,), (("tp", 0),))]
    row_bias = Layout((6,), gradient_sum_axes=("tp",) if sequence_parallel else ())
    for layouts, from_meta in ranks(2, run_layouts, sequence_parallel):
        assert layouts == [
            *column_layouts,
            Layout((6, 8), (("tp", 1),)),
            row_bias,
            Layout((12, 5), (("tp", 0),)),
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


# ---- embedding


def embedding_case(world_size):
    V, B, T = 9 * world_size, 3, 2 * world_size
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    ids[0, :2] = 4  # a repeated token, and the padding one
    return V, ids, draw(B, T, 5, seed=2)


def run_embedding(world_size, sequence_parallel):
    axis = Mesh(tp=world_size).tp
    V, ids, dout = embedding_case(world_size)
    torch.manual_seed(5)
    layer = VocabParallelEmbedding(V, 5, axis, padding_idx=4, sequence_parallel=sequence_parallel)
    out = layer(ids)
    out.backward(dout.chunk(world_size, 1)[axis.rank] if sequence_parallel else dout)
    return out.detach(), layer.weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_embedding_equals_torchs(ranks, world_size, sequence_parallel):
    V, ids, dout = embedding_case(world_size)
    torch.manual_seed(5)
    dense = nn.Embedding(V, 5, padding_idx=4)
    expected = dense(ids)
    expected.backward(dout)
    results = ranks(world_size, run_embedding, world_size, sequence_parallel)
    outs = [out for out, _ in results]
    out = torch.cat(outs, 1) if sequence_parallel and world_size > 1 else outs[-1]
    assert torch.equal(out, expected)
    assert relative(torch.cat([dweight for _, dweight in results]), dense.weight.grad) < 1e-6


# ---- loss


def loss_case(world_size, dtype):
    V, shape = 37 * world_size, (3, 5)
    logits = 4 * draw(*shape, V, seed=1)
    logits[0, 0] *= 1e4  # overflows without the common maximum
    logits[0, 1, : 37 * world_size // 2] = -math.inf  # a whole shard without probability
    targets = torch.randint(V, shape, generator=torch.Generator().manual_seed(2))
    targets[0, 1] = V - 1
    targets[1, 2:4] = -100
    targets[2, 0] = 0
    return logits.to(dtype), targets, draw(*shape, seed=3)


def dense_loss(logits, targets, dloss):
    leaf = logits.clone().requires_grad_()
    losses = functional.cross_entropy(leaf.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )
    losses.backward(dloss.to(losses.dtype))
    return losses.detach(), leaf.grad


def run_loss(world_size, dtype):
    axis = Mesh(tp=world_size).tp
    logits, targets, dloss = loss_case(world_size, dtype)
    leaf = logits.chunk(world_size, -1)[axis.rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, targets, axis)
    calls = axis.traffic.snapshot()
    losses.backward(dloss)
    assert axis.traffic.snapshot() == calls, "backward communicates"
    return losses.detach(), leaf.grad, calls


@pytest.mark.parametrize("world_size", WORLDS)
def test_vocab_parallel_loss_equals_cross_entropy(ranks, world_size):
    logits, targets, dloss = loss_case(world_size, torch.float32)
    losses, dlogits = dense_loss(logits.double(), targets, dloss)
    results = ranks(world_size, run_loss, world_size, torch.float32)
    for actual, _, traffic in results:
        assert actual.dtype == torch.float32
        assert torch.equal(actual, results[0][0])
        for row in range(3):  # each row by itself: the first has a loss of 1e4
            assert relative(actual[row], losses[row]) < 1e-6
        assert traffic.calls == ({} if world_size == 1 else {"all_reduce": 2})
        expected = [wire_bytes("all_reduce", n * targets.numel() * 4, world_size) for n in (1, 2)]
        assert traffic.bytes_sent == sum(expected)
    whole = torch.cat([dlogits for _, dlogits, _ in results], -1)
    assert relative(whole, dlogits) < 1e-6
    assert not whole[1, 2:4].any()


@pytest.mark.parametrize("world_size", WORLDS)
def test_vocab_parallel_loss_of_bf16_logits(ranks, world_size):
    logits, targets, dloss = loss_case(world_size, torch.bfloat16)
    exact_losses, exact = dense_loss(logits.double(), targets, dloss)
    _, peer = dense_loss(logits, targets, dloss)
    results = ranks(world_size, run_loss, world_size, torch.bfloat16)
    assert results[0][0].dtype == torch.float32
    assert relative(results[0][0], exact_losses) < 1e-6
    whole = torch.cat([dlogits for _, dlogits, _ in results], -1)
    assert whole.dtype == torch.bfloat16 and within_twice(whole, peer, exact)


def test_vocab_parallel_loss_with_another_ignore_index(ranks):
    for losses in ranks(2, run_ignoring_zero):
        assert losses[0] == 0 and losses[1] > 0


def run_ignoring_zero():
    axis = Mesh(tp=2).tp
    logits = draw(2, 4, seed=1 + axis.rank).requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([0, 1]), axis, ignore_index=0)
    losses.sum().backward()
    assert not logits.grad[0].any() and logits.grad[1].any()
    return losses.tolist()


# ---- refusals


def run_refused(call):
    axis = Mesh(tp=2).tp
    calls = {
        "out_features": lambda: ColumnParallelLinear(4, 7, axis),
        "in_features": lambda: RowParallelLinear(1, 4, axis),
        "vocabulary": lambda: VocabParallelEmbedding(257, 4, axis),
        "id": lambda: VocabParallelEmbedding(8, 4, axis)(torch.tensor([[3, 8]])),
        "padding": lambda: VocabParallelEmbedding(8, 4, axis, padding_idx=8),
        "biases": lambda: column_parallel(torch.ones(2, 4), [torch.ones(3, 4)], axis, biases=[]),
        "column": lambda: ColumnParallelLinear(4, 8, axis, sequence_parallel=True)(torch.ones(2, 4)),
        "row": lambda: RowParallelLinear(8, 4, axis, sequence_parallel=True)(torch.ones(2, 4)),
        "ids": lambda: VocabParallelEmbedding(8, 4, axis, sequence_parallel=True)(torch.tensor([1])),
        "length": lambda: RowParallelLinear(8, 4, axis, sequence_parallel=True)(torch.ones(1, 3, 4)),
        "target": lambda: vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([8]), axis),
        "targets": lambda: vocab_parallel_cross_entropy(torch.ones(2, 4), torch.tensor([1]), axis),
        "target_type": lambda: vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([1.0]), axis),
    }
    with pytest.raises(ValueError) as caught:
        calls[call]()
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("out_features", "out_features (7) must divide by the tp size (2); use 6 or 8"),
        ("in_features", "in_features (1) must divide by the tp size (2); use 2"),
        ("vocabulary", "(257) must divide by the tp size (2); use 256 or 258"),
        ("id", "token id 8 is outside of the vocabulary [0, 8)"),
        ("padding", "padding_idx (8) must be a token id from 0 to 7"),
        ("biases", "0 biases for 1 weights"),
        ("column", "its input has shape (2, 4); pass x.unsqueeze(0)"),
        ("row", "its input has shape (2, 4); pass x.unsqueeze(0)"),
        ("ids", "they have shape (1,)"),
        ("length", "dim 1 (3)"),
        ("target", "targets contains 8, outside of [0, 8)"),
        ("targets", "reshape targets to (2,)"),
        ("target_type", "convert with targets.long()"),
    ],
)
def test_bad_input_gets_a_sentence(ranks, call, sentence):
    for message in ranks(2, run_refused, call):
        assert sentence in message


def test_one_rank_is_plain_linear():
    torch.manual_seed(1)
    layer = ColumnParallelLinear(6, 8, SINGLE, bias=True, sequence_parallel=True)
    x = draw(3, 6, seed=1)
    assert relative(layer(x), functional.linear(x, layer.weight, layer.bias)) < 1e-6
    assert "tp=1" in repr(layer)
