"""Trainer from Python: pypar's decoder and models of the user's own, spread, alike on every mesh, and resumed.

The quick tests have meshes of two axes, the long ones also those of one.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pypar.blocks import Block, global_parameters
from pypar.context_parallel.config import ContextConfig
from pypar.mesh import Mesh
from pypar.models import CausalAttention, Positions
from pypar.parallel import ParallelPlan
from pypar.sharded import Sharded
from pypar.train import RunConfig, Trainer

CPU = torch.device("cpu")
WIDTH, HEADS = 32, 4
LLAMA = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0)  # fmt: skip


class UsersLayer(nn.Module):
    """As people write it: no rope, a GELU, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_size = HEADS, WIDTH // HEADS
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # A key's bias has a gradient of nothing but rounding, which AdamW makes as large as any.
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.core, self.back = CausalAttention(), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x, sequences):
        normed = self.before_attention(x)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head_size)) for p in (self.query, self.key, self.value))
        x = x + self.back(self.core(q, k, v, sequences).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.before_mlp(x))))


class UsersModel(nn.Module):
    """Learned positions, tied head, a list of layers."""

    def __init__(self, length: int = 24) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.positions = Positions()
        self.tokens, self.place = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleDict({str(i): UsersLayer() for i in range(4)})
        self.last_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.tokens.weight

    def blocks(self):
        layers = [Block(f"layers.{i}", (f"layers.{i}",)) for i in self.layers]
        return [Block("first", ("tokens", "place")), *layers, Block("last", ("last_norm", "head"))]

    def forward(self, x, *, sequences=None):
        if self.tokens is not None:
            x = self.tokens(x) + self.place(self.positions(x, sequences))
        for layer in self.layers.values():
            x = layer(x, sequences)
        return x if self.head is None else self.head(self.last_norm(x))


PLAN = {
    "*.query": "column",
    "*.key": "column",
    "*.value": "column",
    "*.core": "attention",
    "*.back": "row",
    "*.wide": "column",
    "*.narrow": "row",
    "positions": "positions",
}


def _config(text: Path, mesh: str, **train: object) -> dict:
    values = {"steps": 6, "batch_size": 4, "microbatch_size": 1, "sequence_length": 24, "evaluate_batches": 2}
    return {
        "name": mesh or "one",
        "directory": str(text.parent / "runs"),
        "mesh": mesh,
        "data": {"path": str(text), "cache_directory": str(text.parent / "cache")},
        "optimizer": {"warmup_steps": 2, "lr": 1e-2},
        "train": values | train,
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    picks = torch.randint(6, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(("def", "return", "self", "for", "\n", "    ")[i] for i in picks))
    return path


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, Sharded) else p).detach().clone()
        for name, p in global_parameters(model)
    }


def run_users_model(config: dict, kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = RunConfig.from_dict(config)
    sizes = dict(part.split("=") for part in run.mesh.split(",") if part)
    mesh = Mesh(**{axis: int(size) for axis, size in sizes.items()})
    if kind == "llama":
        transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")
        torch.manual_seed(3)
        trainer = Trainer(
            run, mesh, CPU, model=transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        )
    else:
        model = UsersModel()
        if kind == "frozen":
            model.place.requires_grad_(False)
        plan = ParallelPlan(PLAN)
        trainer = Trainer(run, mesh, CPU, model=model, plan=plan if mesh.cp.size > 1 else PLAN)
    lines = [trainer.train_step() for _ in range(run.train.steps)]
    losses = [value for line in lines for value in (line["loss"], line["grad_norm"])] + [trainer.evaluate()]
    return losses, _whole(trainer.model)


@pytest.fixture(scope="module")
def one_process(ranks, text: Path):
    made: dict[str, tuple] = {}

    def run(kind: str):
        if kind not in made:
            (made[kind],) = ranks(1, run_users_model, _config(text, ""), kind)
        return made[kind]

    return run


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("own", "pp=2,tp=2"),
        ("own", "cp=2,tp=2"),
        ("frozen", "dp=2,pp=2"),
        ("llama", "tp=2"),
        *(pytest.param("own", f"{axis}=2", marks=pytest.mark.slow) for axis in ("dp", "tp", "pp", "cp")),
        pytest.param("llama", "dp=2", marks=pytest.mark.slow),
    ],
)
def test_a_model_of_the_users_own_trains_alike_on_every_mesh(
    ranks, text: Path, one_process, kind, mesh
) -> None:
    expected, weights = one_process(kind)
    found = ranks(math.prod(int(n) for n in mesh.replace(",", "=").split("=")[1::2]), run_users_model,
                  _config(text, mesh), kind)  # fmt: skip
    names = set()
    for losses, held in found:
        assert losses == pytest.approx(expected, rel=2e-4)
        for name, weight in held.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4, msg=name)
        names |= set(held)
    assert names == set(weights)
    if kind == "frozen":
        torch.testing.assert_close(
            weights["place.weight"], UsersModel().place.weight.detach(), rtol=0, atol=0
        )


def _squares(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hit = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return ((hit - 1).square() * (targets != -100)).sum()


def test_a_loss_of_the_users_own_and_a_resumed_run(text: Path) -> None:
    config = _config(text, "", checkpoint_every=3)
    config["name"] = "squares"

    def made(**train: object) -> Trainer:
        run = RunConfig.from_dict(config | {"train": config["train"] | train})
        return Trainer(run, Mesh(), CPU, model=UsersModel(), loss=_squares)

    whole = made()
    saved = whole.fit()
    lines = [
        json.loads(line) for line in (text.parent / "runs/squares/metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    middle = saved.with_name("step_00000003")
    again = made(resume=str(middle))
    assert again.fit() == saved
    for name, weight in _whole(again.model).items():
        assert torch.equal(weight, _whole(whole.model)[name]), name


def test_the_decoder_from_python_is_the_run_of_the_command_line(text: Path) -> None:
    """Without a mesh the configuration is checked and the job is joined first."""
    config = _config(text, "", steps=2) | {"model": {"num_layers": 2, "d_model": 16, "d_ff": 24}}
    trainer = Trainer(RunConfig.from_dict(config | {"name": "decoder"}))
    assert trainer.config.mesh == "tp=1" and trainer.step == 0
    path = trainer.fit()
    assert path.name == "step_00000002" and (path.parent.parent / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="holds an earlier run"):
        Trainer(RunConfig.from_dict(config | {"name": "decoder"}))
    with pytest.raises(ValueError, match=r"model.d_model \(17\) must divide by model.num_heads"):
        Trainer(RunConfig.from_dict(config | {"model": {"d_model": 17}}))


def test_what_a_model_cannot_do_is_refused(text: Path) -> None:
    config = RunConfig.from_dict(_config(text, ""))
    with pytest.raises(ValueError, match="plan= and loss= belong to a model"):
        Trainer(config, Mesh(), CPU, loss=_squares)
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="on the meta device, without values"):
        Trainer(config, Mesh(), CPU, model=model)
    trainer = Trainer(config, Mesh(), CPU, model=nn.Sequential(nn.Embedding(256, 8), nn.Flatten(1)))
    with pytest.raises(
        ValueError, match=r"returned \(1, 192\) where logits \[B, T, V\] belong to targets \(1, 24\)"
    ):
        trainer.train_step()
    wrong = RunConfig.from_dict(_config(text, "") | {"optimizer": {"min_lr_ratio": 2.0}})
    with pytest.raises(ValueError, match=r"optimizer.min_lr_ratio \(2.0\) must be at least 0 and at most 1"):
        Trainer(wrong, Mesh(), CPU, model=UsersModel())
    packed = RunConfig.from_dict(_config(text, "", packed_documents=True))
    with pytest.raises(ValueError, match='forward has no keyword "sequences"'):
        Trainer(packed, Mesh(), CPU, model=nn.Embedding(256, 256))


def run_sequence_parallel(config: dict) -> str:
    with pytest.raises(ValueError) as caught:
        Trainer(RunConfig.from_dict(config), Mesh(tp=2), CPU, model=UsersModel(), plan=PLAN)
    return str(caught.value)


def test_sequence_parallel_of_the_configuration_holds_for_a_model_of_the_users_own(ranks, text: Path) -> None:
    for said in ranks(2, run_sequence_parallel, _config(text, "", sequence_parallel=True)):
        assert "sequence parallelism needs a role for every parameter" in said


def test_evaluation_leaves_every_module_in_its_mode(text: Path) -> None:
    model = UsersModel()
    trainer = Trainer(RunConfig.from_dict(_config(text, "")), Mesh(), CPU, model=model)
    model.layers["1"].eval()
    before = [module.training for module in model.modules()]
    trainer.evaluate()
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def run_two_contexts(config: dict) -> str:
    plan = ParallelPlan(PLAN, context=ContextConfig(layout="striped"))
    with pytest.raises(ValueError) as caught:
        Trainer(RunConfig.from_dict(config), Mesh(cp=2), CPU, model=UsersModel(), plan=plan)
    same = RunConfig.from_dict(config | {"context": {"layout": "striped"}})
    Trainer(same, Mesh(cp=2), CPU, model=UsersModel(), plan=plan).train_step()
    return str(caught.value)


def test_a_plan_must_not_cut_sequences_otherwise_than_the_data_are_cut(ranks, text: Path) -> None:
    for said in ranks(2, run_two_contexts, _config(text, "")):
        assert "layout='striped'" in said and "context.layout='zigzag'" in said


def run_refused(config: dict, sizes: dict) -> str:
    run, mesh = RunConfig.from_dict(config), Mesh(**sizes)
    torch.manual_seed(mesh.dp.rank)
    with pytest.raises(ValueError) as caught:
        Trainer(run, mesh, CPU, model=nn.Embedding(256, 256))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"dp": 2}, "the ranks have different models: weight differs"),
        ({"cp": 2}, 'no module of this Embedding has the role "attention"'),
        ({"pp": 2}, "a Embedding does not say what its blocks are"),
    ],
)
def test_what_a_model_cannot_do_on_a_mesh_is_refused(ranks, text: Path, sizes, sentence) -> None:
    for said in ranks(2, run_refused, _config(text, ""), sizes):
        assert sentence in said
