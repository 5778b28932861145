"""A decoder's forward and backward under each policy of recomputation, beside torch.utils.checkpoint, after a check.

    python bench/recompute.py [--threads 1] [--rounds 15] [--layers 8] [--positions 512] [--dtype fp32|bf16]

Each line: the time over that of a model that keeps all, the median over rounds in which all take turns, and the
activations that it keeps, to the byte and over those of the model that keeps all. Gradients of all are the same bits.
"""

import argparse
import statistics

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import pypar
from pypar.bench.timing import DTYPES, times
from pypar.models import Decoder, DecoderConfig
from pypar.recomputation import SavedBytes
from pypar.recomputation.operators import COSTLY, overloads, pypar_overloads

OURS = {
    "pypar none": ("none", None),
    "pypar full": ("full", None),
    "pypar full, every 2nd": ("full", None),
    "pypar selective": ("selective", None),
    'pypar selective, ops ["attention"]': ("selective", ["attention"]),
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


def models(make) -> dict[str, nn.Module]:
    found = {
        name: pypar.recompute(make(), policy, ops=ops, every=2 if "2nd" in name else 1)
        for name, (policy, ops) in OURS.items()
    }
    found["torch checkpoint"] = checkpointed(make())
    found["torch checkpoint, selective"] = checkpointed(make(), context_fn=contexts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("threads", 1), ("rounds", 15), ("layers", 8), ("positions", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = DecoderConfig(256, given.layers, 256, 4, 2, 64, 704)
    tokens = torch.randint(0, 256, (1, given.positions), generator=torch.Generator().manual_seed(0))

    def step(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, targets=tokens).backward()
        return [p.grad for p in model.parameters()]

    contenders = models(lambda: Decoder(config, dtype=DTYPES[given.dtype]))
    expected, sizes = step(contenders["pypar none"]), {}
    for name, model in contenders.items():
        found = step(model)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        with SavedBytes(model) as saved:
            loss = model(tokens, targets=tokens)
        sizes[name] = saved.num_bytes
        del loss
    runs = {name: lambda model=model: step(model) for name, model in contenders.items()}
    seconds = {name: statistics.median(each) for name, each in times(runs, rounds=given.rounds).items()}
    print(f"{config}, 1 x {given.positions} tokens, {given.dtype}, {given.threads} threads")
    for name in contenders:
        # torch's checkpoints hold tensors that no hook sees.
        is_seen = not name.startswith("torch")
        share = sizes[name] / sizes["pypar none"]
        kept = f"{sizes[name]:12,} bytes, {share:6.1%}" if is_seen else "not counted"
        ratio = seconds[name] / seconds["pypar none"]
        print(f"{name:38} {seconds[name] * 1e3:8.1f} ms, {ratio:5.3f}x | {kept}")


if __name__ == "__main__":
    main()
