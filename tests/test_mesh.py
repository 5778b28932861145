import torch

from pypar import comm, mesh


def _mesh(dp, tp):
    m = mesh.Mesh(dp=dp, tp=tp)
    x = torch.full((3,), float(m.world.rank))
    comm.all_reduce_start(x, m.world).wait()
    return m.tp.ranks, m.dp.ranks, m.data.ranks, x


def test_mesh(ranks):
    print(ranks(4, _mesh, 2, 2))
    for i in range(5):
        ranks(4, _mesh, 2, 2)
    for i in range(5):
        ranks(2, _mesh, 1, 2)
