"""Native kernels with another instruction set or another number of threads than this machine takes by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pypar.ops import native
from pypar.selftest.judge import differs, draw_douts, outputs, results


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Native kernels run with this instruction set inside."""
    module = native.module()
    before = module.selected_isa()
    module.select_isa(name)
    try:
        yield
    finally:
        module.select_isa(before)


def assert_same_for_any_threads(function: Callable, inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients are bitwise equal for 1, 2 and 3 threads, and from run to run."""
    douts = draw_douts(outputs(function, inputs))
    num_threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(results(function, inputs, douts))
    finally:
        torch.set_num_threads(num_threads)
    for other in found[1:]:
        assert differs(found[0], other) is None
