"""Small models of transformers, and what one process gives for them."""

import torch
from transformers import AutoModelForCausalLM

LENGTH = 20
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = SIZES | {"num_key_value_heads": 2}


def model_from(config, implementation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def tokens():
    return torch.randint(3, 32, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def results(model, inputs, targets, **options):
    logits = model(input_ids=inputs, **options).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_equal(outcome, model):
    """outcome: the whole logits and a share of the gradients, by rank. model: runs in this process."""
    expected = results(model, tokens()[:, :-1], tokens()[:, 1:])
    for logits, _ in outcome:
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
    for gradient, *shares in zip(expected[1], *(gradients for _, gradients in outcome), strict=True):
        torch.testing.assert_close(sum(shares), gradient, rtol=1e-4, atol=1e-5)
