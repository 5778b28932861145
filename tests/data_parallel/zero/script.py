"""What scripts of the tests have in common: a model with its store, a step, what is saved and what is held."""

import torch
import torch.distributed as dist

import pypar
from pypar.mesh import Mesh
from tests.data_parallel.zero.programs import Model
from tests.data_parallel.zero.trees import batch

STAGES = (0, 1, 2, 3)


def make(stage=3, *, world_size=2, model=Model, **options):
    """(model, store, its optimizer, this rank)"""
    torch.manual_seed(0)
    made = model()
    store = pypar.zero(made, Mesh(dp=world_size), stage=stage, **options)
    return made, store, torch.optim.SGD(store.parameters(), lr=0.1, momentum=0.9), dist.get_rank()


def loss_of(model, rank, step=0):
    return model.loss(*batch(rank, step, 0), step)


def update(store, optimizer):
    optimizer.step()
    store.publish()
    store.zero_grad()


def whole_state(store):
    return {name: tensor.clone() for name, tensor in store.state_dict(whole=True).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def bytes_of(tensors):
    """Of the storages behind them, each once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
