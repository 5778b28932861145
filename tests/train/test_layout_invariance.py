"""Parallelism changes nothing but the speed: every layout gives the losses and weights of one process.

`make test` runs layouts in which every pair of axes and every schedule, layout of the sequence, way of tensor
parallelism and method of context parallelism occurs; the long tests add the whole product, eight ranks and 20 steps.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from pypar.blocks import global_parameters
from pypar.mesh import Mesh
from pypar.pipeline_parallel import schedules
from pypar.pipeline_parallel.action import WEIGHT_GRADIENT
from pypar.pipeline_parallel.trained import check_trains
from pypar.sharded import Sharded
from pypar.train.config import RunConfig
from pypar.train.trainer import Trainer

NUM_STEPS = 20
SOME_STEPS = 6  # the last at the full learning rate
FEW_STEPS = 3  # where what differs is attention alone
TIMEOUT_S = 600  # eight ranks on two cores wait for each other most of the time
AXES = ("dp", "pp", "cp", "tp")
QUICK = (
    "one",
    "dp2-pp2-gpipe",
    "dp2-cp2-contiguous",
    "dp2-tp2-sp",
    "pp2-cp2-gpipe-zigzag",
    "pp2-tp2-sp-gpipe",
    "cp2-tp2-sp-zigzag",
    "cp2-tp2-contiguous",
    "pp4-one_f_one_b",
    "tp4-sp",
)


def _kind(name: str) -> str:
    """What matters of a schedule to the rest of a run, "" where a run cannot have it."""
    schedule = schedules.build(name, 4, 4)
    try:
        check_trains(name, schedule)
    except ValueError:
        return ""
    split = any(action.kind == WEIGHT_GRADIENT for actions in schedule.lists for action in actions)
    last = schedule.placement[0, schedule.num_stages - 1]
    return f"{schedule.stages_per_rank} stages a rank, the last one on {last}, backward split: {split}"


KINDS = {name: kind for name in schedules.names() if (kind := _kind(name))}
# One schedule of each kind that none of these names has runs too.
NAMED = {name for name in KINDS if any(f"-{name}" in quick for quick in QUICK)}
FIRST_OF = {
    kind: name for name, kind in reversed(KINDS.items()) if kind not in {KINDS[named] for named in NAMED}
}
QUICK += tuple(f"pp2-{name}" for name in FIRST_OF.values())


def _factorisations(world_size: int) -> list[dict[str, int]]:
    sizes = [n for n in (1, 2, 4, 8) if n <= world_size]
    products = itertools.product(sizes, repeat=4)
    return [dict(zip(AXES, p, strict=True)) for p in products if p[0] * p[1] * p[2] * p[3] == world_size]


def _schedules_for(mesh: dict[str, int], num_layers: int) -> list[str]:
    """Those whose stages have a layer each: alone all, with other axes one of each kind, on 8 ranks the first two."""
    pp = mesh["pp"]
    if pp == 1:
        return [RunConfig().pipeline.schedule]
    num_ranks = math.prod(mesh.values())
    named = KINDS if num_ranks == pp else NAMED if num_ranks == 8 else {*NAMED, *FIRST_OF.values()}
    return [
        name for name in KINDS if name in named and schedules.build(name, pp, pp).num_stages <= num_layers
    ]


def _cases() -> list:
    cases = []
    for world_size in (1, 2, 4, 8):
        for mesh in _factorisations(world_size):
            for sequence_parallel, schedule, layout in itertools.product(
                (False, True) if mesh["tp"] > 1 else (False,),
                _schedules_for(mesh, 8 if world_size == 8 else 4),
                ("zigzag", "contiguous") if mesh["cp"] > 1 else ("zigzag",),
            ):
                name = "-".join([f"{axis}{size}" for axis, size in mesh.items() if size > 1] or ["one"])
                name += (
                    "-sp" * sequence_parallel
                    + f"-{schedule}" * (mesh["pp"] > 1)
                    + f"-{layout}" * (mesh["cp"] > 1)
                )
                case = (mesh, sequence_parallel, schedule, layout)
                if name in QUICK:
                    cases.append(pytest.param(*case, SOME_STEPS, id=f"{name}-{SOME_STEPS} steps"))
                cases.append(pytest.param(*case, NUM_STEPS, id=name, marks=pytest.mark.slow))
    return cases


def _context_cases() -> list:
    """(mesh, method, layout, changes of the train section)."""
    sp = {"sequence_parallel": True}
    odd, documents = {"sequence_length": 29}, {"packed_documents": True, "sequence_length": 29}
    quick = [
        ("cp=2", "auto", "striped", {}),
        ("cp=2,tp=2", "all_gather", "zigzag", sp),
        ("cp=2,pp=2", "ulysses", "contiguous", {}),
        ("cp=4", "hybrid", "zigzag", {}),
        ("cp=2,pp=2", "ring", "zigzag", documents),
        ("cp=2,tp=2", "ulysses", "striped", documents),
    ]
    long = [
        ("cp=2", "ulysses", "zigzag", {}),
        ("cp=2,dp=2", "hybrid", "zigzag", {}),
        ("cp=2,pp=2", "ring", "zigzag", odd),
        ("dp=2", "ring", "zigzag", documents),
        ("cp=4", "all_gather", "contiguous", documents),
    ]
    return [
        pytest.param(*case, id="-".join((*case[:3], *case[3])), marks=marks)
        for cases, marks in ((quick, ()), (long, pytest.mark.slow))
        for case in cases
    ]


def _config(text: Path, world_size: int, tied: bool = False) -> dict:
    wide = world_size == 8  # eight stages and eight-way heads need eight layers and key/value heads
    return {
        "name": "invariance",
        "seed": 3,
        "mesh": "",
        "data": {"path": str(text), "cache_directory": str(text.parent / "cache")},
        "model": {
            "num_layers": 8 if wide else 4,
            "d_model": 64,
            "num_heads": 8,
            "num_kv_heads": 8 if wide else 4,
            "d_ff": 96,
            "tied_embeddings": tied,
        },
        # eps: AdamW divides a gradient by its own size; where both are at the level of rounding, which differs between
        # layouts, a smaller eps would make steps of it.
        "optimizer": {"lr": 1e-3, "warmup_steps": 5, "clip_norm": 1.0, "eps": 1e-6},
        "train": {
            "steps": NUM_STEPS,
            "batch_size": 8 if wide else 4,
            "microbatch_size": 1,
            "sequence_length": 32,
        },
    }


def _changed(config: dict, text: Path, changes: dict) -> dict:
    config["train"] |= changes
    if changes.get("packed_documents"):
        config["data"]["path"] = str(text.with_name("records.jsonl"))
    return config


def train(
    config: dict, num_steps: int = NUM_STEPS
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """In each rank: losses (the last one on validation text), gradient norms, its stages' whole weights at the end."""
    run = RunConfig.from_dict(config)
    sizes = dict(part.split("=") for part in run.mesh.split(",") if part)
    mesh = Mesh(**{axis: int(size) for axis, size in sizes.items()})
    trainer = Trainer(run, mesh, torch.device("cpu"))
    lines = [trainer.train_step() for _ in range(num_steps)]
    weights = {}
    for name, parameter in (each for model in trainer.models for each in global_parameters(model)):
        whole = parameter.full_tensor() if isinstance(parameter, Sharded) else parameter
        weights[name] = whole.detach()
    losses = [m["loss"] for m in lines] + [trainer.evaluate(2)]
    return losses, [m["grad_norm"] for m in lines], weights


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ("def", "return", "self", "for", "in", "range", "if", "not", "None", "import", "\n", "    ")
    picks = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(words[i] for i in picks))
    parts = (" ".join(words[i] for i in picks[n : n + 1 + n % 7]) for n in range(0, len(picks), 7))
    path.with_name("records.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


@pytest.fixture(scope="session")
def one_process(ranks, text: Path):
    """The same run on one rank, made once for each model."""
    made: dict = {}

    def get(world_size: int, tied: bool = False, num_steps: int = NUM_STEPS, **changes):
        changes.pop("sequence_parallel", None)
        key = (world_size == 8, tied, num_steps, *changes.items())
        if key not in made:
            config = _changed(_config(text, world_size, tied), text, changes)
            made[key] = ranks(1, train, config, num_steps, timeout_s=TIMEOUT_S)[0]
        return made[key]

    return get


def _assert_equal(results: list, expected: tuple) -> None:
    expected_losses, expected_norms, expected_weights = expected
    seen: set[str] = set()
    for losses, norms, weights in results:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
        # Later norms say how far weights have moved apart, which is compared below, more than how they were summed.
        torch.testing.assert_close(norms[:5], expected_norms[:5], rtol=1e-5, atol=0)
        for name, weight in weights.items():
            seen.add(name)
            allowed = 1e-4 * expected_weights[name].abs().max().item()
            torch.testing.assert_close(
                weight, expected_weights[name], rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert seen == set(expected_weights)


def test_quick_layouts_hold_every_pair_of_axes_and_every_choice() -> None:
    def choices(case) -> set[str]:
        mesh, sequence_parallel, schedule, layout, _ = case.values
        axes = [axis for axis in AXES if mesh[axis] > 1]
        found = {*axes, *("-".join(pair) for pair in itertools.combinations(axes, 2))}
        found |= {f"sequence parallel: {sequence_parallel}"} if "tp" in axes else set()
        return found | ({KINDS[schedule]} if "pp" in axes else set()) | ({layout} if "cp" in axes else set())

    quick = [case for case in _cases() if not case.marks]
    assert len(quick) == len(QUICK)
    assert set().union(*map(choices, quick)) == set().union(*map(choices, _cases()))


@pytest.mark.parametrize(("mesh", "sequence_parallel", "schedule", "layout", "num_steps"), _cases())
def test_every_layout_trains_alike(
    ranks,
    text: Path,
    one_process,
    mesh: dict,
    sequence_parallel: bool,
    schedule: str,
    layout: str,
    num_steps: int,
) -> None:
    world_size = mesh["dp"] * mesh["pp"] * mesh["cp"] * mesh["tp"]
    config = _config(text, world_size)
    config |= {
        "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.items()),
        "pipeline": {"schedule": schedule},
        "context": {"layout": layout},
    }
    config["train"]["sequence_parallel"] = sequence_parallel
    # Enough microbatches to fill the pipeline, at least two: more would only repeat the same communication.
    fewest = max(2, mesh["pp"]) * mesh["dp"]
    config["train"]["microbatch_size"] = max(1, config["train"]["batch_size"] // fewest)
    expected = one_process(world_size, num_steps=num_steps)
    _assert_equal(ranks(world_size, train, config, num_steps, timeout_s=TIMEOUT_S), expected)


@pytest.mark.parametrize(
    "mesh",
    [
        "pp=2,tp=2",
        "dp=2,pp=2",
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("pp=2", "tp=2", "pp=4")),
    ],
)
def test_tied_embeddings_train_alike(ranks, text: Path, one_process, mesh: str) -> None:
    world_size = 1
    for part in mesh.split(","):
        world_size *= int(part.split("=")[1])
    config = _config(text, world_size, tied=True) | {"mesh": mesh}
    expected = one_process(world_size, tied=True, num_steps=SOME_STEPS)
    _assert_equal(ranks(world_size, train, config, SOME_STEPS, timeout_s=TIMEOUT_S), expected)


@pytest.mark.parametrize(("mesh", "method", "layout", "changes"), _context_cases())
def test_methods_of_context_parallelism_train_alike(
    ranks, text: Path, one_process, mesh: str, method: str, layout: str, changes: dict
) -> None:
    world_size = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    config = _config(text, world_size) | {"mesh": mesh, "context": {"method": method, "layout": layout}}
    _changed(config, text, changes)
    expected = one_process(world_size, num_steps=FEW_STEPS, **changes)
    _assert_equal(ranks(world_size, train, config, FEW_STEPS, timeout_s=TIMEOUT_S), expected)


def test_training_learns(one_process) -> None:
    losses, _, _ = one_process(1)
    assert losses[NUM_STEPS - 1] < 0.85 * losses[0]
