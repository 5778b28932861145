"""A decoder's forward and backward by each way to keep fewer activations, beside torch.utils.checkpoint, after a check.

    python bench/recompute.py [--threads 1] [--rounds 15] [--layers 8] [--positions 512] [--dtype fp32|bf16]
                              [--budgets 0.25 0.5] [--picture FILE] [--only NAME ...]

Each line: the time over that of a model that keeps all, the median over rounds in which all take turns; what the
layers hold at most in a step, to the byte, over those of the model that keeps all, and on the host. Gradients of all
are the same bits, and what a way holds must be what its formula says: pypar.models.activations, or the plan of a budget
(a share of what the model that keeps all holds). --picture draws what is held over the time of a step, by category.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import pypar
from pypar.bench.timing import DTYPES, times
from pypar.bench.training import timeline
from pypar.bench.training.sharded import Running, num_bytes
from pypar.models import Decoder, DecoderConfig
from pypar.models.activations import Held, Microbatch, peak_bytes
from pypar.ops import native
from pypar.recomputation import SavedBytes
from pypar.recomputation.offload import Offload
from pypar.recomputation.operators import COSTLY, overloads, pypar_overloads
from pypar.recomputation.parts import part_of

# policy, ops, every nth, whether what is kept waits on the host
OURS = {
    "pypar none": ("none", None, 1, False),
    "pypar full": ("full", None, 1, False),
    "pypar full, every 2nd": ("full", None, 2, False),
    "pypar selective": ("selective", None, 1, False),
    'pypar selective, ops ["attention"]': ("selective", ["attention"], 1, False),
    "pypar offload": ("none", None, 1, True),
    "pypar full, offload": ("full", None, 1, True),
    "pypar selective, offload": ("selective", None, 1, True),
}


def checkpointed(model: nn.Module, **options) -> nn.Module:
    """The model with torch's checkpoint around each layer."""
    for layer in model.layers.values():
        forward = layer.forward
        layer.forward = lambda *given, forward=forward: checkpoint(
            forward, *given, use_reentrant=False, **options
        )
    return model


def contexts():
    kept = [*overloads(COSTLY), *pypar_overloads(COSTLY)]
    return create_selective_checkpoint_contexts(kept)


def makers(make, budgets: dict[str, int]) -> dict[str, Callable[[], nn.Module]]:
    """What makes the model of each contender."""

    def ours(policy: str, ops: list[str] | None, every: int, moves: bool) -> nn.Module:
        offload = Offload(min_bytes=1) if moves else None
        return pypar.recompute(make(), policy, ops=ops, every=every, offload=offload)

    def planned(budget: int) -> nn.Module:
        model = make()
        pypar.plan_activations(model, budget, min_bytes=1)
        return model

    found = {name: partial(ours, *way) for name, way in OURS.items()}
    found |= {name: partial(planned, budget) for name, budget in budgets.items()}
    found["torch checkpoint"] = lambda: checkpointed(make())
    found["torch checkpoint, selective"] = lambda: checkpointed(make(), context_fn=contexts)
    return found


def part(model: nn.Module):
    return next((p for p in map(part_of, model.modules()) if p is not None), None)


def held(model: Decoder, positions: int) -> Held:
    """The most that the layers hold in a step of their own, on the device and on the host."""
    tables = model.rope_tables(torch.arange(positions))
    leaf = torch.ones(1, positions, model.config.d_model, dtype=model.embedding.weight.dtype)
    x = leaf.requires_grad_() + 1
    with SavedBytes(model) as saved:
        for layer in model.layers.values():
            x = layer(x, *tables)
        x.sum().backward()
    model.zero_grad()
    offload = part(model).offload if part(model) is not None else None
    host = offload.host_peak if offload is not None else 0
    return Held(saved.peak_bytes - sum(x.nbytes for x in tables), host)


def formula(name: str, config: DecoderConfig, given: Microbatch) -> Held | None:
    """What the layers of a model should hold; None where there is no formula."""
    policy, ops, every, moves = OURS[name]
    if every > 1:
        return None
    kept = (ops or COSTLY) if policy == "selective" else ()
    return peak_bytes(config, given, recomputed=policy != "none", kept=kept, offloaded=moves)


def picture(
    path: Path, contenders: dict[str, Callable[[], nn.Module]], tokens: torch.Tensor, title: str
) -> None:
    """What each of pypar's holds in the course of a step."""

    def begun(make: Callable[[], nn.Module]) -> Running:
        model = make()

        def steps():
            while True:
                model.zero_grad()
                with SavedBytes(model) as saved:
                    now.append(saved)
                    loss = model(tokens, targets=tokens)
                    loss.backward()
                yield float(loss.detach())

        now: list[SavedBytes] = []

        def categories() -> dict[str, int]:
            offload = part(model).offload if part(model) is not None else None
            return {
                "parameters": num_bytes(model.parameters()),
                "gradients": num_bytes(p.grad for p in model.parameters()),
                "activations": now[-1].num_bytes if now else 0,
                "host": offload.host_now if offload is not None else 0,
            }

        return Running(steps(), model, categories)

    drawn = {
        name: timeline.record(partial(begun, make))
        for name, make in contenders.items()
        if not name.startswith("torch")
    }
    timeline.draw(path, title, drawn)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("threads", 1), ("rounds", 15), ("layers", 8), ("positions", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.25, 0.5], metavar="SHARE")
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw into a PNG")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    torch.set_num_threads(given.threads)
    config = DecoderConfig(256, given.layers, 256, 4, 2, 64, 704)
    dtype = DTYPES[given.dtype]
    exact_lse = given.dtype == "fp32" and native.missing() is None
    microbatch = Microbatch(1, given.positions, dtype.itemsize, lse_copies=2 if exact_lse else 1)
    tokens = torch.randint(0, 256, (1, given.positions), generator=torch.Generator().manual_seed(0))

    def step(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, targets=tokens).backward()
        return [p.grad for p in model.parameters()]

    whole = peak_bytes(config, microbatch).device
    budgets = {f"pypar budget of {share:.0%}": int(share * whole) for share in given.budgets}
    wanted = ("pypar none", *(given.only or ("",)))
    every = makers(lambda: Decoder(config, dtype=dtype), budgets)
    make = {name: each for name, each in every.items() if any(word in name for word in wanted)}
    contenders = {name: each() for name, each in make.items()}
    expected, sizes = step(contenders["pypar none"]), {}
    for name, model in contenders.items():
        for _ in range(2):  # a budget's plan is made in the second one
            found = step(model)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        if name in budgets:
            planner = part(model).planner
            sizes[name] = Held(planner.measured_bytes, planner.offload.host_peak)
            assert planner.measured_bytes == planner.plan.peak_bytes <= budgets[name], name
        elif name in OURS:
            sizes[name] = held(model, given.positions)
            predicted = formula(name, config, microbatch)
            assert predicted is None or sizes[name] == predicted, f"{name}: {sizes[name]}, not {predicted}"
    runs = {name: lambda model=model: step(model) for name, model in contenders.items()}
    seconds = {name: statistics.median(each) for name, each in times(runs, rounds=given.rounds).items()}
    sizes_of_model = f"{given.layers} layers of {config.d_model}, feed-forward part {config.d_ff}"
    title = f"{sizes_of_model}, 1 x {given.positions} tokens, {given.dtype}, {given.threads} threads"
    print(title)
    for name in contenders:
        kept = "not counted"  # torch's checkpoints hold tensors that no hook sees
        if name in sizes:
            kept = f"{sizes[name].device:12,} bytes, {sizes[name].device / whole:6.1%}, host {sizes[name].host:12,}"
        ratio = seconds[name] / seconds["pypar none"]
        print(f"{name:38} {seconds[name] * 1e3:8.1f} ms, {ratio:5.3f}x | {kept}")
    if given.picture:
        picture(given.picture, make, tokens, title)


if __name__ == "__main__":
    main()
