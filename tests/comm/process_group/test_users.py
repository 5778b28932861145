"""What torch builds on process groups, on the backend "pypar": each against the same on one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

from tests.harness.samples import draw, relative

RANKS = 2
TOLERANCE = 1e-5  # fp32; a mean over ranks sums in another order than one over the batch


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 24))


def _gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    model(batch).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _batch() -> tuple[Tensor, Tensor]:
    """(all rows, this rank's rows)"""
    rows = draw(4 * RANKS, 24, seed=3)
    return rows, rows.chunk(RANKS)[dist.get_rank()]


def _ddp(find_unused, as_views, compressed):
    group = dist.new_group(backend="pypar")
    rows, mine = _batch()
    model = nn.parallel.DistributedDataParallel(
        _model(),
        process_group=group,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=as_views,
        bucket_cap_mb=0.001,  # several buckets
    )
    if compressed:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        model.register_comm_hook(group, fp16_compress_hook)
    expected = _gradients(_model(), rows)
    for _ in range(2):  # buckets are rebuilt after the first step
        model.zero_grad()
        for name, grad in _gradients(model, mine).items():
            assert relative(grad, expected[name.removeprefix("module.")]) < (
                2e-2 if compressed else TOLERANCE
            )


@pytest.mark.parametrize(
    ("find_unused", "as_views", "compressed"),
    [(False, False, False), (True, True, False), (False, True, True)],
    ids=["plain", "unused-views", "fp16-hook"],
)
def test_distributed_data_parallel(ranks, find_unused, as_views, compressed):
    ranks(RANKS, _ddp, find_unused, as_views, compressed)


def _fully_shard(narrow):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    rows, mine = _batch()
    model = _model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if narrow else MixedPrecisionPolicy()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    expected = _gradients(_model(), rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        for name, grad in _gradients(model, mine).items():
            assert relative(grad.full_tensor(), expected[name]) < (5e-2 if narrow else TOLERANCE)
        optimizer.step()


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_fully_shard(ranks, narrow):
    ranks(RANKS, _fully_shard, narrow)


def _dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    a, b = draw(8, 6, seed=1), draw(6, 10, seed=2)
    for placements in ([Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(1), Shard(0)]):
        x, y = (distribute_tensor(t, mesh, [p]) for t, p in zip((a, b), placements, strict=True))
        product = x @ y
        assert relative(product.full_tensor(), a @ b) < TOLERANCE
        for target in (Shard(0), Shard(1), Replicate()):
            assert relative(product.redistribute(mesh, [target]).full_tensor(), a @ b) < TOLERANCE
    # Uneven rows, from one dimension to the other (all_to_all), and a sum that is scattered.
    uneven = distribute_tensor(draw(7, 5, seed=4), mesh, [Shard(0)]).redistribute(mesh, [Shard(1)])
    assert torch.equal(uneven.full_tensor(), draw(7, 5, seed=4))
    partial = (distribute_tensor(a, mesh, [Shard(1)]) @ distribute_tensor(b, mesh, [Shard(0)])).redistribute(
        mesh, [Shard(0)]
    )
    assert partial.to_local().shape == (8 // RANKS, 10)
    assert Partial() not in partial.placements


def test_dtensor(ranks):
    ranks(RANKS, _dtensor)


def _collectives_of(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A function of functional collectives; the same on every rank."""
    total = functional.all_reduce(x, "sum", group)
    rows = functional.all_gather_tensor(total * 2, 0, group)
    part = functional.reduce_scatter_tensor(rows, "sum", 0, group)
    turned = functional.all_to_all_single(part, None, None, group)
    return functional.broadcast(turned, 0, group) + 1


def _functional(compiled):
    group = dist.new_group(backend="pypar")
    x = draw(6, 4, seed=dist.get_rank())
    total = sum(draw(6, 4, seed=r) for r in range(RANKS))
    run = torch.compile(_collectives_of, backend="aot_eager", fullgraph=True) if compiled else _collectives_of
    outcome = run(x, group)
    # reduce_scatter leaves 2 * RANKS * total on both ranks, the exchange gives the first its upper half twice.
    part = 2 * RANKS * total
    assert relative(outcome - 1, torch.cat([part[:3], part[:3]])) < TOLERANCE


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_functional_collectives(ranks, compiled):
    ranks(RANKS, _functional, compiled, timeout_s=120)


def _pipeline(name):
    from torch.distributed import pipelining
    from torch.distributed.pipelining import PipelineStage

    rank = dist.get_rank()
    rows, _ = _batch()
    whole = _model()
    half = nn.Sequential(whole[0], whole[1]) if rank == 0 else nn.Sequential(whole[2])
    stage = PipelineStage(half, rank, RANKS, torch.device("cpu"))
    losses: list[Tensor] = []
    schedule = getattr(pipelining, name)(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    target = draw(4 * RANKS, 24, seed=5)
    if rank == 0:
        schedule.step(rows)
    else:
        schedule.step(target=target, losses=losses)
    reference = _model()
    (reference(rows) - target).square().mean().backward()
    prefix = [0, 2][rank]
    for key, parameter in half.named_parameters():
        expected = dict(reference[prefix].named_parameters())[key.split(".")[-1]].grad
        assert relative(parameter.grad, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipelining(ranks, name):
    ranks(RANKS, _pipeline, name)


def _checkpoint(folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    x = draw(7, 12, seed=6)
    dcp.save({"x": distribute_tensor(x, mesh, [Shard(0)]), "step": 5}, checkpoint_id=folder)
    for placement in (Shard(1), Replicate()):
        state = {"x": distribute_tensor(torch.zeros_like(x), mesh, [placement]), "step": 0}
        dcp.load(state, checkpoint_id=folder)
        assert torch.equal(state["x"].full_tensor(), x)
        assert state["step"] == 5
    # In the background, while the ranks go on with collectives of their own.
    saving = dcp.async_save(
        {"y": distribute_tensor(2 * x, mesh, [Shard(0)])},
        checkpoint_id=folder + "/later",
        process_group=dist.new_group(backend="pypar"),
    )
    for _ in range(20):
        dist.all_reduce(torch.ones(3))
    saving.result()
    later = {"y": distribute_tensor(torch.zeros_like(x), mesh, [Shard(0)])}
    dcp.load(later, checkpoint_id=folder + "/later")
    assert torch.equal(later["y"].full_tensor(), 2 * x)


def test_distributed_checkpoint(ranks, tmp_path):
    ranks(RANKS, _checkpoint, str(tmp_path))


def _objects():
    rank = dist.get_rank()
    gathered: list = [None] * RANKS
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * (10 + 1000 * rank)})
    assert [x["rank"] for x in gathered] == list(range(RANKS))
    box = [copy.deepcopy(gathered)] if rank == 0 else [None]
    dist.broadcast_object_list(box, 0)
    assert box[0] == gathered
    dist.monitored_barrier(dist.new_group(backend="gloo"))


def test_objects(ranks):
    ranks(RANKS, _objects)
