"""A process in which Triton interprets kernels on CPU tensors: TRITON_INTERPRET must be set before they are imported,
and this process also needs them compiled. `call` runs any function there; the others have the arguments and results of
attention's backend."""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests import ROOT


class Interpreter:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.triton_interpreter"],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments) in that process; AssertionError with its traceback where it raises."""
        return self._call(function, *arguments)

    def forward(
        self, problem: Any, carry: tuple[Tensor, Tensor] | None, splits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return _in_place(carry, self._call("attention_forward", problem, carry, splits))

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """arguments: problem, dout, out, lse, dlse, into, dbias."""
        *_, into, dbias = arguments
        found, new_dbias = self._call("attention_backward", *arguments)
        _in_place(dbias, new_dbias)
        return _in_place(into, found)

    def unsupported(self, problem: Any) -> str | None:
        return self._call("unsupported", problem)

    def _call(self, *request: Any) -> Any:
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        failed, result = pickle.load(self._process.stdout)
        if failed:
            raise AssertionError(result)
        return result

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


def _in_place(given: Any, result: Any) -> Any:
    """`given` with the result's values, as the worker changed a copy; the result if nothing was given."""
    if given is None:
        return result
    if isinstance(given, Tensor):
        return given.copy_(result)
    for target, value in zip(given, result, strict=True):
        target.copy_(value)
    return given


def _answer(name: str | Callable[..., Any], *arguments: Any) -> Any:
    if callable(name):
        return name(*arguments)
    from pypar.kernels import attention
    from pypar.ops.attention import triton as attention_triton

    if name == "unsupported":
        return attention_triton.unsupported(*arguments)
    if name == "attention_forward":
        return attention.attention_forward(*arguments)
    return attention_triton.backward(*arguments), arguments[-1]


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not get between the answers
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (False, _answer(*request))
        except Exception:
            answer = (True, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
