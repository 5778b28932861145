"""Gradients of one model that are summed over different axes, each group while backward runs."""

import torch

from pypar.data_parallel.gradients import Gradients
from pypar.layout import Cut, Layout, set_layout
from pypar.mesh import Mesh

SUMS = {
    "dense": ("dp", "cp"),
    "norm": ("cp", "dp", "tp"),
    "expert": ("edp",),
    "alone": (),
    "other": ("dp",),
}


def _model(mesh):
    """Parameters of four elements; that of an expert is another one on each rank of ep."""
    parameters = {}
    for name, axes in SUMS.items():
        whole = (8,) if name == "expert" else (4,)
        parameters[name] = torch.nn.Parameter(torch.ones(4) + mesh.ep.rank * (name == "expert"))
        set_layout(parameters[name], Layout(whole, (Cut(0, "ep"),) * (name == "expert"), axes))
    return parameters


def _backward(parameters, factor):
    sum((factor * p).sum() for p in parameters.values()).backward()


def _step(options, bucket_bytes):
    mesh = Mesh(**options)
    parameters = _model(mesh)
    gradients = Gradients(parameters.values(), mesh, bucket_bytes=bucket_bytes, gradient_dtype=torch.float64)
    for axis in gradients.axes:
        axis.traffic.reset()
    gradients.zero()
    with gradients.accumulate():
        _backward(parameters, 100.0)
    silent = sum(axis.traffic.bytes_sent for axis in gradients.axes)
    _backward(parameters, float(2**mesh.rank))
    under_way = [axis.traffic.bytes_sent > 0 for axis in gradients.axes if axis.size > 1]
    gradients.finish()
    gradients.scale(0.5)
    for name, axes in SUMS.items():
        ranks = mesh.grid.group(mesh.rank, *axes)
        expected = 0.5 * sum(100.0 + 2**rank for rank in ranks)
        assert gradients.gradient(parameters[name]).tolist() == [expected] * 4, name
    assert silent == 0 and all(under_way)
    return [axis.ranks for axis in gradients.axes]


def test_each_parameter_is_summed_over_its_own_axes(ranks):
    """Sets of axes that are the same ranks share their buckets."""
    groups = ranks(4, _step, {"dp": 2, "tp": 2, "ep": 2}, 32)
    assert groups[1] == [(1,), (1, 3), (0, 1, 2, 3)]  # alone, expert; dense, other; norm
    groups = ranks(4, _step, {"dp": 2, "cp": 2, "ep": 2}, 1 << 20)
    assert groups[1] == [(1,), (1, 3), (0, 1, 2, 3)]  # alone; expert, other; dense, norm


def _stages(options):
    """Ranks whose groups arrive in another order: the first stage has a tied parameter last, the last one first."""
    mesh = Mesh(**options)
    first, last = mesh.pp.rank == 0, mesh.pp.rank == mesh.pp.size - 1
    names = ["a", "b"] + ["tied"] * (first or last)
    parameters = {}
    for name in names if last else names[::-1]:
        parameters[name] = torch.nn.Parameter(torch.ones(3))
        axes = ("dp", "cp", "tied") if name == "tied" else ("dp", "cp")
        set_layout(parameters[name], Layout((3,), sum_over=axes))
    gradients = Gradients(parameters.values(), mesh, bucket_bytes=12)
    for _ in range(3):
        gradients.zero()
        _backward(parameters, 1.0 + mesh.rank)
        gradients.finish()
    for name, parameter in parameters.items():
        ranks = (mesh.axis("dp", "cp", "tied") if name == "tied" else mesh.data).ranks
        assert parameter.grad.tolist() == [sum(1.0 + rank for rank in ranks)] * 3
    return len(names), len(gradients.axes)


def test_a_parameter_that_is_tied_between_stages_is_summed_over_both(ranks):
    assert ranks(4, _stages, {"pp": 2, "dp": 2}) == [(3, 2)] * 4
    assert ranks(4, _stages, {"pp": 4}) == [(3, 2), (2, 1), (2, 1), (3, 2)]
