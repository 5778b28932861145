"""What `pypar.zero` cannot do is a sentence on every rank; nothing hangs, and no gradient is silently wrong."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh

import pypar
from pypar.axis import Axis
from pypar.blocks import Block
from pypar.mesh import Mesh
from tests.data_parallel.zero.programs import Model
from tests.data_parallel.zero.trees import batch
from tests.harness.refusals import sentences


def on_meta():
    with torch.device("meta"):
        return Model()


def run_refusals():
    mesh = Mesh(dp=2)
    used = Model()
    pypar.zero(used, mesh)
    half = Model()
    half.layers[1].first.weight.requires_grad_(mesh.rank == 0)
    ints = Model()
    ints.count = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    pypar.zero(ints, mesh)  # a frozen parameter may be of any dtype
    return sentences(
        lambda: pypar.zero(Model(), mesh, stage=4),
        lambda: pypar.zero(Model(), mesh, stage=True),
        lambda: pypar.zero(Model(), mesh, stage="3"),
        lambda: pypar.zero(Model(), mesh, shard_size=3),
        lambda: pypar.zero(Model(), mesh, shard_size=-1),
        lambda: pypar.zero(Model(), mesh, reshard=-2),
        lambda: pypar.zero(Model(), mesh, reshard=3),
        lambda: pypar.zero(Model(), mesh, reshard="no"),
        lambda: pypar.zero(Model(), mesh, stage=2, reshard=False),
        lambda: pypar.zero(Model(), mesh, dtype=torch.int8),
        lambda: pypar.zero(Model(), mesh, accumulate="never"),
        lambda: pypar.zero(Model(), mesh, stage=1, accumulate="reduce"),
        lambda: pypar.zero(Model(), mesh, blocks=["layers.7"]),
        lambda: pypar.zero(Model(), mesh, blocks=["layers", "layers.1"]),
        lambda: pypar.zero(
            Model(), mesh, blocks=[Block("twice", ("layers.1",)), Block("again", ("layers.1",))]
        ),
        lambda: pypar.zero(Model(), mesh, bucket_bytes=0),
        lambda: pypar.zero(Model(), dist.group.WORLD),
        lambda: pypar.zero(Model().parameters(), mesh),
        lambda: pypar.zero(nn.LazyLinear(3), mesh),
        lambda: pypar.zero(on_meta(), mesh),
        lambda: pypar.zero(used, mesh),
        lambda: pypar.zero(pypar.DataParallel(Model(), mesh.data), mesh),
        lambda: pypar.zero(fully_shard(Model(), mesh=DeviceMesh("cpu", [0, 1])), mesh),
        lambda: pypar.zero(Model().requires_grad_(False), mesh),
        lambda: pypar.zero(nn.Linear(3, 2 + mesh.rank), mesh),
        lambda: pypar.zero(half, mesh),
        lambda: pypar.zero(Model(), mesh, stage=2 + mesh.rank),
        lambda: pypar.zero(Model(), mesh, blocks=["layers.0"] if mesh.rank else ["layers.1"]),
    )


EXPECTED = (
    "stage (4) must be",
    "stage (True) must be",
    "stage ('3') must be",
    "shard_size (3) must divide dp (2)",
    "shard_size (-1) must",
    "reshard (-2) must be",
    "reshard (3) must",
    "reshard ('no') must be",
    "stage=3",
    "dtype (torch.int8) must be",
    "accumulate ('never') must be",
    'accumulate="reduce"',
    "layers.7",
    "lie in one another",
    "layers.1",
    "bucket_bytes (0) must be positive",
    "Mesh",
    "takes a torch.nn.Module",
    "no shape yet",
    "meta device",
    "already",
    "already",
    "DTensor",
    "no parameter that requires a gradient",
    "not the same on all 2 ranks",
    "not the same on all 2 ranks",
    "every rank",
    "every rank",
)


def test_refusals_are_sentences_on_every_rank(ranks):
    for said in ranks(2, run_refusals):
        for found, wanted in zip(said, EXPECTED, strict=True):
            assert wanted in found, found


def test_a_model_of_one_rank_may_have_nothing_to_train_in_a_block():
    model = Model()
    model.layers.requires_grad_(False)
    assert len(pypar.zero(model, Mesh()).owned()) == 3


def run_misuse(stage, way):
    """The same on every rank: each one gets the error, none waits for another."""
    model = Model()
    store = pypar.zero(model, Mesh(dp=2), stage=stage)
    loss = model.loss(*batch(dist.get_rank(), 0, 0), 0)
    if way == "create_graph":
        with pytest.raises(RuntimeError) as caught:
            loss.backward(create_graph=True)
    elif way == "two backwards":
        loss.backward()
        with pytest.raises(RuntimeError) as caught:
            model.loss(*batch(dist.get_rank(), 1, 0), 1).backward()
    elif way == "accumulate after the last":
        loss.backward()
        with pytest.raises(RuntimeError) as caught, store.accumulate():
            model.loss(*batch(dist.get_rank(), 1, 0), 1).backward()
    elif way == "frozen in between":
        model.layers[1].requires_grad_(False)
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
            store.clip_grad_norm(1.0)
    elif way == "converted":
        with pytest.raises(RuntimeError) as caught:
            model.to(torch.float64)
            model.double().loss(*batch(dist.get_rank(), 1, 0).double(), 1).backward()
    elif way == "loaded directly":
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(Model().state_dict())
    elif way == "saved directly":
        with pytest.raises(RuntimeError) as caught:
            torch.save(model.state_dict(), "/dev/null")
    dist.barrier()
    return str(caught.value)


MISUSES = {
    "two backwards": "accumulate()",
    "accumulate after the last": "zero_grad()",
    "create_graph": "create_graph=True",
    "converted": "convert",
}
OF_STAGE_3 = {"loaded directly": "store", "saved directly": "store"}


@pytest.mark.parametrize(
    ("stage", "way"),
    [*((stage, way) for stage in (0, 2, 3) for way in MISUSES), *((3, way) for way in OF_STAGE_3)],
)
def test_misuse_is_an_error_on_every_rank(ranks, stage, way):
    for said in ranks(2, run_misuse, stage, way):
        assert (MISUSES | OF_STAGE_3)[way] in said, said


def run_one_more_backward(stage, monkeypatch_timeout_s=2):
    """Rank 0 makes two steps, rank 1 one."""
    mesh = Mesh(dp=2)
    group = dist.new_group(backend="pypar", timeout=timedelta(seconds=monkeypatch_timeout_s))
    impatient = Axis.of(group, "data", mesh.data.grid)
    for axes, axis in list(mesh._axes.items()):
        if axis.size == 2:
            mesh._axes[axes] = impatient
    mesh.data = mesh.dp = impatient
    model = Model()
    store = pypar.zero(model, mesh, stage=stage)
    model.loss(*batch(dist.get_rank(), 0, 0), 0).backward()
    store.zero_grad()
    message = ""
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as error:
            model.loss(*batch(0, 1, 0), 1).backward()
        message = str(error.value)
    dist.barrier()
    return message


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_that_runs_fewer_backwards_is_named(ranks, stage):
    message = ranks(2, run_one_more_backward, stage)[0]
    assert "must run the same number of forward and backward passes" in message
    assert "these ranks did not come: 1" in message
