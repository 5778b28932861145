"""`pypar.zero` in a user's script: objects that stay, memory that goes, errors that leave a model which trains on."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pypar.data_parallel.zero import zero
from pypar.mesh import Mesh


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.unused, self.empty = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(0, 3))
        self.frozen = nn.Parameter(torch.ones(3, 7), requires_grad=False)
        self.fails = ""

    def forward(self, x):
        if self.fails == "forward":
            raise ZeroDivisionError
        if self.fails == "backward":
            x.register_hook(lambda _: 1 / 0)
        return x + self.down(self.up(x).relu()) * self.scale + self.frozen.mean(0)


class Model(nn.Module):
    """With tied weights, and a layer that is used twice."""

    def __init__(self, seed=0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 7)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.layers.append(self.layers[1])
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(3.0))

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def loss_of(model, mesh, step):
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(10 * step + mesh.data.rank))
    return cross_entropy(model(ids).float().flatten(0, 1), ids.roll(1).flatten())


def step(model, store, optimizer, number):
    store.zero_grad()
    with store.accumulate():
        loss_of(model, store.mesh, 2 * number).backward()
    loss = loss_of(model, store.mesh, 2 * number + 1)
    loss.backward()
    norm = store.clip_grad_norm(0.1)
    optimizer.step()
    store.publish()
    return loss.item(), norm.item()


def sizes(model):
    return {name: p.untyped_storage().size() for name, p in model.named_parameters() if p.numel()}


def made(stage, seed=0, **options):
    model, mesh = Model(seed), Mesh(dp=2)
    store = zero(model, mesh, stage, **options)
    return model, store, torch.optim.AdamW(store.parameters(), lr=0.01)


def _train(stage, fails, options):
    model, store, optimizer = made(stage, **options)
    objects = [id(p) for p in model.parameters()]
    seen = [step(model, store, optimizer, 0)]
    if fails:
        model.layers[0].fails = fails
        for is_last in (True, False) if fails == "forward" else (True,):
            store.zero_grad()
            with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
                if not is_last:
                    stack.enter_context(store.accumulate())
                loss_of(model, store.mesh, 7).backward()
        model.layers[0].fails = ""
    seen += [step(model, store, optimizer, number) for number in (1, 2)]
    assert objects == [id(p) for p in model.parameters()]
    if stage == 3:
        assert set(sizes(model).values()) == {0}
        assert store.memory()["gathered"] == 0
        assert store.peak_memory()["gathered"] <= sum(p.nbytes for p in model.parameters())
    plain = Model(seed=1)
    plain.load_state_dict(
        {name: x.to(plain.state_dict()[name].dtype) for name, x in store.state_dict().items()}
    )
    with torch.no_grad():
        seen.append(loss_of(model, store.mesh, 9).item())
        if "dtype" not in options:
            assert loss_of(plain, store.mesh, 9).item() == seen[-1]
    return seen


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_stages_and_failures_train_alike(ranks, options):
    """After a forward or backward that raised, the next step is what it would have been."""
    expected = ranks(2, _train, 0, "", options)
    for stage, fails, more in (
        (1, "", {}),
        (2, "backward", {}),
        (3, "forward", {}),
        (3, "backward", {}),
        (3, "", {"reshard": False, "bucket_bytes": 64}),
    ):
        assert ranks(2, _train, stage, fails, options | more) == expected, (stage, fails, more)


def _freed():
    model, store, _ = made(3)
    weight = model.layers[0].up.weight
    with store.gathered():
        view = weight.t()
        before = weight.detach().clone()
        version = weight._version
    assert weight.untyped_storage().size() == view.untyped_storage().size() == 0
    assert weight.shape == (5, 7) and weight is model.layers[0].up.weight and weight._version == version
    sentences = []
    for read in (weight.sum, weight.detach, lambda: weight + 1, lambda: weight.data, model.state_dict):
        with pytest.raises(RuntimeError) as refused:
            read()
        sentences.append(str(refused.value))
    with store.gathered():
        assert torch.equal(view.t(), before)
        with torch.no_grad():
            weight.fill_(store.mesh.data.rank * 0 + 3.0)
    with store.gathered():
        assert (weight == 3).all() and torch.equal(store.state_dict()["layers.0.up.weight"], weight)
    other = zero(Model(seed=2), store.mesh, 1)
    other.load_state_dict(store.state_dict())
    other.load_state_dict(other.state_dict(whole=False))
    for name, value in other.state_dict().items():
        assert torch.equal(value, store.state_dict()[name])
    return sentences


def test_what_is_freed_says_so(ranks):
    for sentences in ranks(2, _freed):
        assert [s.partition(" needs the values of a parameter")[0] for s in sentences] == [
            *("sum", "detach", "add", "data", "detach")
        ]


def _refused(case):
    model, mesh = Model(), Mesh(dp=2)
    rank = mesh.data.rank
    with pytest.raises((ValueError, RuntimeError)) as refused:
        if case == "other weights":
            zero(Model(seed=rank), mesh)
        elif case == "other options":
            zero(model, mesh, 2 + rank)
        elif case == "twice":
            zero(model, mesh)
            zero(model, mesh)
        elif case == "second backward":
            store = zero(model, mesh, 2)
            loss_of(model, mesh, 0).backward()
            loss_of(model, mesh, 1).backward()
            assert store
        elif case == "state":
            zero(model, mesh).load_state_dict({"embedding.weight": torch.ones(11, 7)})
        else:
            zero(model, mesh, **case)
    assert model.embedding.weight.untyped_storage().size() or case in ("twice", "state")
    return str(refused.value)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("other weights", "the parameters are not the same on all 2 ranks"),
        ("other options", "do not ask for the same store"),
        ("twice", "has gradient buckets or a store already"),
        ("second backward", "call store.zero_grad() before each step's first backward"),
        ("state", "the state lacks 'layers.0.scale' and 21 more"),
        ({"stage": 4}, "stage (4) must be 0"),
        ({"stage": 2, "reshard": False}, "with stage=2 they are whole"),
        ({"stage": 1, "accumulate": "reduce"}, "with stage=1 they are whole"),
        ({"shard_size": 3}, "shard_size (3) must divide dp (2)"),
        ({"blocks": ["layers.7"]}, "block 'layers.7' names the module 'layers.7'"),
        ({"blocks": ["layers", "layers.0"]}, "lie in one another"),
        ({"dtype": torch.int8}, "dtype (torch.int8) must be a floating-point one"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(ranks, case, sentence):
    for found in ranks(2, _refused, case):
        assert sentence in found
