"""A checkpoint written by one layout continues under another as if nothing had happened.

In the quick tests each axis writes and reads once; the long ones have more pairs of layouts, and fp32 bitwise, as
test_faults.py has it quickly. That boxes of any layout
fill those of any other is for tests/layout/test_checkpoint.py.
"""

from pathlib import Path

import pytest
import torch

from pypar.mesh import Mesh, parse_mesh
from pypar.train.config import RunConfig
from pypar.train.trainer import Trainer

HALF = 4  # the first 3 steps warm up


def _config(directory: Path, mesh: str, precision: str = "fp32", tied: bool = True) -> dict:
    return {
        "name": "resume",
        "mesh": mesh,
        "data": {"path": str(directory / "text.txt"), "cache_directory": str(directory / "cache")},
        "model": {
            "num_layers": 4,
            "d_model": 32,
            "num_heads": 4,
            "num_kv_heads": 4,
            "d_ff": 48,
            "tied_embeddings": tied,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 3},
        "train": {
            "steps": 2 * HALF,
            "batch_size": 4,
            "microbatch_size": 1,
            "sequence_length": 32,
            "precision": precision,
        },
    }


def run_part(config: dict, load: str | None, save: str | None, num_steps: int) -> list[float]:
    """In each rank: train ``num_steps`` from ``load`` (or the start) and save to ``save``; the losses."""
    run = RunConfig.from_dict(config)
    trainer = Trainer(run, Mesh.of(parse_mesh(run.mesh)), torch.device("cpu"))
    if load is not None:
        trainer.load(Path(load))
    losses = [trainer.train_step()["loss"] for _ in range(num_steps)]
    if save is not None:
        trainer.save(Path(save))
    return losses


def _ranks_of(mesh: str) -> int:
    return parse_mesh(mesh).grid.num_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    (path / "text.txt").write_text("".join(f"{i} times {i} makes {i * i}\n" for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def whole(ranks, directory: Path) -> list[float]:
    """The losses of one process."""
    return ranks(1, run_part, _config(directory, ""), None, None, 2 * HALF)[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cp=2,dp=2", ""),
        ("tp=2", "dp=2,pp=2"),
        ("pp=4", "cp=2,tp=2"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("tp=2", "pp=2"), ("pp=2", "tp=2"), ("dp=2", ""), ("", "cp=2"), ("pp=4", "tp=2"))
        ),
    ],
)
def test_another_layout_continues_the_loss_curve(
    ranks, directory: Path, whole: list[float], before: str, after: str
) -> None:
    place = directory / f"{before}-{after}".replace(",", "-").replace("=", "")
    first = ranks(_ranks_of(before), run_part, _config(directory, before), None, str(place), HALF)
    path = place / f"step_{HALF:08d}"
    second = ranks(_ranks_of(after), run_part, _config(directory, after), str(path), None, HALF)
    for losses in first:
        torch.testing.assert_close(losses, whole[:HALF], rtol=1e-5, atol=0)
    for losses in second:
        torch.testing.assert_close(losses, whole[HALF:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_the_same_layout_continues_bitwise(ranks, directory: Path, precision: str) -> None:
    config = _config(directory, "tp=2", precision, tied=False)
    whole = ranks(2, run_part, config, None, None, 2 * HALF)[0]
    place = directory / f"bitwise-{precision}"
    ranks(2, run_part, config, None, str(place), HALF)
    assert ranks(2, run_part, config, str(place / f"step_{HALF:08d}"), None, HALF)[0] == whole[HALF:]


def test_bf16_with_fp32_masters_learns_like_fp32(ranks, directory: Path, whole: list[float]) -> None:
    bf16 = ranks(1, run_part, _config(directory, "", "bf16"), None, None, 2 * HALF)[0]
    torch.testing.assert_close(bf16, whole, rtol=2e-2, atol=0)
    assert bf16[0] - bf16[-1] > 0.95 * (whole[0] - whole[-1])
