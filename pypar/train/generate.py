"""Sampling text from a checkpoint, in one process."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pypar.layout import layout_of
from pypar.mesh import Mesh
from pypar.models.cache import KeyValueCache
from pypar.train import checkpoint
from pypar.train.config import RunConfig
from pypar.train.data.tokens import check_text, continuation, open_tokenizer
from pypar.train.preflight import check_whole_model


def load_model(path: Path) -> tuple[nn.Module, RunConfig]:
    """The whole model of a checkpoint, whatever layout wrote it, in fp32, in a process without a process group."""
    config, sizes = check_whole_model(path)
    model: nn.Module = config.model.model_class()(sizes, seed=None)
    state = {f"model.{name}": (p.detach(), layout_of(p)) for name, p in model.named_parameters()}
    checkpoint.load(path, state, Mesh())
    return model.eval(), config


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompt_T: Tensor,
    num_tokens: int,
    *,
    num_ids: int,
    context: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Token ids one at a time; ``prompt_T``: int64 [T], T >= 1.

    ``num_ids``: the tokenizer's; a model may have more, to divide by tp. When ``context`` positions are full, the
    newer half is kept.
    """
    window = prompt_T[-context:]
    cache, fed = KeyValueCache(context), 0
    for _ in range(num_tokens):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
            cache, fed = KeyValueCache(context), 0
        logits_V = model(window[None, fed:], cache=cache)[0, -1, :num_ids].float()
        cache.advance(len(window) - fed)
        fed = len(window)
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        window = torch.cat([window, torch.tensor([token])])
        yield token


def printable(text: str, prompt: str = "") -> str:
    """``text``, after its ``prompt``, without the control characters that a terminal would obey."""
    new = re.sub(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.removeprefix(prompt))
    return prompt + new


def generate(path: Path, prompt: str, num_tokens: int, *, temperature: float = 0.8, seed: int = 0) -> str:
    """The prompt and up to ``num_tokens`` sampled after it, to the document's end at most; temperature 0 = greedy.

    The prompt stands first, exactly as it was given. Where it is empty, what follows begins a document.
    """
    if temperature < 0:
        raise ValueError(
            f"temperature ({temperature}) must be at least 0; 0 always takes the likeliest token"
        )
    check_text("the prompt", prompt)
    model, config = load_model(path)
    tokenizer = open_tokenizer(config.data.tokenizer, config.data.special_tokens)
    prompt_ids = tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(seed)
    tokens = sample_tokens(
        model,
        torch.tensor(prompt_ids or [tokenizer.end_token]),
        num_tokens,
        num_ids=tokenizer.vocab_size,
        context=min(config.train.sequence_length, len(prompt_ids or [0]) + num_tokens),
        temperature=temperature,
        generator=generator,
    )
    new = []
    for token in tokens:
        if token == tokenizer.end_token:
            break
        new.append(token)
    return prompt + continuation(tokenizer, prompt_ids, new)
