"""A training run from start to end: join the job, train, write what the user reads."""

from collections.abc import Mapping
from pathlib import Path

from pypar.mesh import Mesh, parse_mesh
from pypar.train.config import RunConfig
from pypar.train.generate import generate, printable
from pypar.train.job import process_group
from pypar.train.metrics import Metrics, draw_loss_curve
from pypar.train.trainer import Trainer


def run(config: RunConfig) -> None:
    """Train as ``config`` says, from the checkpoint that it names, if any; writes <directory>/<name>/."""
    with process_group(config.train.threads) as device:
        mesh = Mesh.of(parse_mesh(config.mesh), device_type=device.type)
        trainer = Trainer(config, mesh, device)
        saved = trainer.fit()
    entropies = trainer.data.validation_entropies() if mesh.world.rank == 0 else {}
    del trainer  # the sample loads the model anew
    if mesh.world.rank == 0:
        _report(config, entropies, saved)


def _report(config: RunConfig, entropies: Mapping[str, float], saved: Path) -> None:
    """What the user came for: validation loss beside the text's entropies, a picture, a sample."""
    train, directory = config.train, config.run_directory
    lines = Metrics.read(directory / "metrics.jsonl")
    levels = {f"{name} entropy": value for name, value in entropies.items()}
    draw_loss_curve(lines, levels, directory / "loss.png")
    compared = ", ".join(f"{name} {value:.3f}" for name, value in levels.items())
    print(f"validation loss {lines[-1]['val_loss']:.4f} nats a token ({compared} of the same text)")
    if train.sample_tokens:
        text = generate(saved, train.sample_prompt, train.sample_tokens, seed=config.seed)
        (directory / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"sample:\n{printable(text, train.sample_prompt)}\n")
    for what, path in (
        ("checkpoint", saved),
        ("loss curve", directory / "loss.png"),
        ("metrics", directory / "metrics.jsonl"),
    ):
        print(f"{what:<11}{path}")
