"""What tensor-parallel layers send, when they start it, and what they do not send."""

import pytest

from pypar.comm import wire_bytes
from pypar.mesh import Mesh
from pypar.tensor_parallel import ColumnParallelLinear, RowParallelLinear, column, column_parallel, sharded
from tests.harness.samples import draw


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


@pytest.mark.parametrize("world_size", [1, 2, 4])
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

    collectives = ("all_gather_start", "all_reduce_start", "reduce_scatter_start")
    products = ("linear_input_gradient", "linear_weight_gradient")
    with pytest.MonkeyPatch.context() as patch:
        for module in (column, sharded):
            for name in set(vars(module)).intersection((*collectives, *products)):
                patch.setattr(module, name, recorded(name, getattr(module, name)))
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
