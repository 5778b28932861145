"""What tests of GPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.triton_interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """interpreter.call(function, ...): in a process where Triton interprets kernels, which takes seconds to start."""
    from tests.harness.triton_interpreter import Interpreter

    worker = Interpreter()
    try:
        yield worker
    finally:
        worker.close()
