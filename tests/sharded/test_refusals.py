"""What a tensor that is cut says of itself, and what it refuses."""

import copy
import math

import torch
from torch import nn

import pypar
from pypar.layout import layout_of
from pypar.mesh import Axis, Mesh
from pypar.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tests.sharded.cases import assert_same, pair

# ---- what it says of itself

REFUSED = {
    "matmul": lambda p: p @ p,
    "linear": lambda p: nn.functional.linear(torch.ones(8), p),
    "sum along dim 0": lambda p: p.sum(0),
    "mean along dim -1": lambda p: p.mean(-1, keepdim=True),
    "norm along dim 1": lambda p: p.norm(dim=1),
    "max along dim 0": lambda p: p.max(0),
    "view": lambda p: p.view(-1),
    "reshape": lambda p: p.reshape(-1),
    "flatten": lambda p: p.flatten(),
    "indexing": lambda p: p[0],
    "indexing ": lambda p: p.data.__setitem__(0, 1.0),
    "x.T": lambda p: p.T,
    "transpose": lambda p: p.transpose(0, 1),
    "cat": lambda p: torch.cat([torch.ones(2, 8), p]),
    "stack": lambda p: torch.stack([p, p]),
    "chunk": lambda p: p.chunk(2),
    "split": lambda p: p.split(2),
    "unbind": lambda p: list(p),
    "sort": lambda p: p.sort(),
    "topk": lambda p: p.topk(1),
    "argmax": lambda p: p.argmax(),
    "cumsum": lambda p: p.cumsum(0),
    "svd": lambda p: torch.linalg.svd(p),
    "qr": lambda p: torch.linalg.qr(p),
    "matrix norm": lambda p: torch.linalg.norm(p, 2),
    "softmax": lambda p: p.softmax(0),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "__float__": lambda p: float(p),
    "einsum": lambda p: torch.einsum("ij,ij->i", p, p),
    "not pickled": lambda p: p.__reduce_ex__(2),
    "neither its shape nor": lambda p: p + torch.ones(8, 8),
    "into a plain tensor": lambda p: torch.zeros(16, 8).add_(p),
    "would pair other elements": lambda p: p + RowParallelLinear(8, 16, p._pypar_sharding.axis).weight,
    "cannot become a plain tensor": lambda p: setattr(p, "data", torch.ones(8, 8)),
    "has no gradient": lambda p: p.max(),
}


def run_refused():
    _, cut = pair()
    messages = {}
    for name, use in REFUSED.items():
        try:
            messages[name] = f"accepted: {use(cut.up.weight)}"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_would_mix_parts_is_refused_by_name(ranks):
    for messages in ranks(2, run_refused):
        for name, message in messages.items():
            assert name.strip() in message, (name, message)
            assert "up.weight (16, 8), cut along dim 0 over axis 'tp'" in message or "plain tensor" in message
            assert any(
                word in message for word in ("full_tensor()", "detach()", "local()", "give the whole")
            ), message


def run_sizes():
    whole, cut = pair()
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        assert (ours.shape, ours.size(), ours.size(-1), ours.dim(), ours.ndim) == (
            theirs.shape,
            theirs.size(),
            theirs.size(-1),
            theirs.dim(),
            theirs.ndim,
        )
        assert (ours.numel(), len(ours), ours.stride(), ours.nbytes) == (
            theirs.numel(),
            len(theirs),
            theirs.stride(),
            theirs.nbytes,
        )
        assert isinstance(ours, nn.Parameter) and ours.is_leaf and ours.grad is ours.grad
        assert ours.grad.shape == theirs.grad.shape and torch.zeros_like(ours).shape == theirs.shape
        assert (
            ours.new_zeros(3).shape == (3,) and torch.ones(theirs.numel()).view_as(ours).shape == theirs.shape
        )
        assert torch.zeros(ours.shape).shape == theirs.shape
    up = cut.up.weight
    assert tuple(up.local().shape) == (8, 8) and type(up.local()) is torch.Tensor
    assert up.local().data_ptr() == up.data_ptr() and torch.equal(up.full_tensor(), whole.up.weight)
    assert layout_of(up).global_shape == (16, 8) and "up.weight (16, 8)" in repr(up)
    assert (cut.up.in_features, cut.up.out_features, cut.down.in_features) == (8, 16, 16)
    assert (cut.tokens.num_embeddings, cut.tokens.embedding_dim) == (12, 8)
    up.data = torch.ones(16, 8)
    up.grad = torch.linspace(0, 1, 128).view(16, 8)
    assert float(up.sum()) == 128 and math.isclose(float(up.grad.sum()), 64, rel_tol=1e-6)
    up.grad = None
    assert up.grad is None


def test_sizes_are_the_whole_tensors(ranks):
    ranks(2, run_sizes)


def test_an_axis_of_one_rank_has_plain_parameters():
    for layer in (
        ColumnParallelLinear(4, 6, Axis.single("tp")),
        VocabParallelEmbedding(4, 6, Axis.single("tp")),
    ):
        assert type(layer.weight) is nn.Parameter and type(layer.state_dict()["weight"]) is torch.Tensor


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x.to(self.up.weight.dtype) * self.up.weight.shape[0] / self.up.weight.numel()
        return x + self.down.weight.norm() + self.up.bias.sum()


def run_compiled():
    torch.manual_seed(0)
    whole = Uses()
    cut = pypar.parallelize(copy.deepcopy(whole), Mesh(tp=2), {"up": "column", "down": "row"})
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(cut, backend="eager")(x), whole(x))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (cut, whole)]
    for model in (cut, whole):
        sum(p.square().sum() for p in model.parameters()).backward()
    torch.compile(optimizers[0].step, backend="eager")()
    optimizers[1].step()
    assert_same(cut, whole)


def test_compiled_code_uses_the_whole_too(ranks):
    ranks(2, run_compiled)
