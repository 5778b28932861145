"""Processes of their own that start in milliseconds, as forks of one in which everything that ranks want is loaded."""

import multiprocessing
from multiprocessing.context import ForkServerContext

# The last two take longer than torch itself, and most ranks want one of them: the first comes with any optimizer.
PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "numpy",
    "pytest",
    "pypar.comm",
    "pypar.layout",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
]


def forkserver() -> ForkServerContext:
    """Starts processes. There is one server in a test session, which loads what PRELOAD says when it is first asked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
