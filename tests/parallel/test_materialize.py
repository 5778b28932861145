"""A model of the meta device is spread first, and then each rank allocates its own part alone."""

import pytest
import torch
from torch import nn

import pypar
from pypar.blocks import global_parameters, keep_stage
from pypar.layout import layout_of, local_tensor
from pypar.mesh import Mesh
from pypar.models import Decoder, DecoderConfig
from pypar.parallel import ParallelPlan, fill, materialize
from pypar.sharded import Sharded

CONFIG = DecoderConfig(
    vocab_size=16,
    num_layers=4,
    d_model=8,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    d_ff=12,
    tied_embeddings=True,
)


def _whole():
    return dict(Decoder(CONFIG, seed=5).named_parameters())


def run_meta(sizes, sequence_parallel):
    mesh = Mesh(**sizes)
    with torch.device("meta"):
        model = Decoder(CONFIG, seed=None)
    plan = ParallelPlan(sequence_parallel=sequence_parallel)
    assert pypar.parallelize(model, mesh, plan) is model
    if mesh.pp.size > 1:
        keep_stage(model, mesh.pp.size, mesh.pp.rank)
    layouts = {name: layout_of(p) for name, p in global_parameters(model)}
    assert all(p.is_meta for p in model.parameters())
    asked = []

    def values(name, shape):
        asked.append(name)
        return model.initial_weight(5)(name, shape)

    materialize(model, values)
    whole = _whole()
    assert len(asked) == len(set(asked))
    for name, parameter in global_parameters(model):
        assert layout_of(parameter) == layouts[name], name
        held = parameter.full_tensor() if isinstance(parameter, Sharded) else parameter
        assert torch.equal(held, whole[name]), name
        cut = mesh.tp.size if layouts[name].axes else 1
        assert local_tensor(parameter).numel() * cut == whole[name].numel()
        assert local_tensor(parameter).untyped_storage().nbytes() == local_tensor(parameter).nbytes
        summed = "tp" in layout_of(parameter).sum_over
        assert summed == (sequence_parallel and "norm" in name), name
    fill(model, lambda name, shape: 2 * whole[name])
    for name, parameter in global_parameters(model):
        held = parameter.full_tensor() if isinstance(parameter, Sharded) else parameter
        assert torch.equal(held, 2 * whole[name]), name
    return sorted(set(asked))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_each_rank_allocates_its_own_part(ranks, sequence_parallel):
    stages = ranks(4, run_meta, {"pp": 2, "tp": 2}, sequence_parallel)
    assert set(stages[0]) | set(stages[3]) == set(_whole())
    assert set(stages[0]) & set(stages[3]) == {"embedding.weight"}


def run_gradients(sequence_parallel):
    """In a plain loop, without pypar's buckets, gradients of norms are whole."""
    mesh = Mesh(tp=2)
    tokens = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(1))
    one = Decoder(CONFIG, seed=5)
    one(tokens).square().sum().backward()
    with torch.device("meta"):
        model = Decoder(CONFIG, seed=None)
    pypar.parallelize(model, mesh, ParallelPlan(sequence_parallel=sequence_parallel))
    materialize(model, model.initial_weight(5))
    model(tokens).square().sum().backward()
    expected = {name: p.grad for name, p in one.named_parameters()}
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, Sharded) else parameter.grad
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_plain_loop_has_whole_gradients(ranks, sequence_parallel):
    ranks(2, run_gradients, sequence_parallel)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.zeros(3))


def test_what_has_no_value_is_refused():
    with torch.device("meta"):
        model, buffered = nn.Linear(2, 3), Buffered()
    with pytest.raises(
        ValueError, match=r"weight has the shape \(3, 2\) in the model, and a value of shape \(2,\)"
    ):
        materialize(model, lambda name, shape: torch.zeros(2))
    with pytest.raises(ValueError, match="buffer table is on the meta device"):
        materialize(buffered, lambda name, shape: torch.zeros(shape))


def run_refused():
    mesh = Mesh(tp=2)
    plan = ParallelPlan({"up": "column", "down": "row"}, sequence_parallel=True)
    model = nn.Sequential()
    model.up, model.down, model.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
    with pytest.raises(ValueError, match="says nothing of norm.weight, norm.bias: give what sees"):
        pypar.parallelize(model, mesh, plan)
    named = ParallelPlan({**plan.roles, "norm": "norm"}, sequence_parallel=True)
    with pytest.raises(
        ValueError, match="cannot check this Sequential as verify asks: positions are cut as well"
    ):
        pypar.parallelize(model, mesh, named, verify=True)
    assert type(model.up) is nn.Linear
    pypar.parallelize(model, mesh, named, verify=False)


def test_sequence_parallelism_asks_for_every_role(ranks):
    ranks(2, run_refused)
