"""attention's Triton kernels in Triton's interpreter. The bfloat16 path runs elsewhere:
tests/gpu/attention/test_ptx_triton.py.

Each option has one batch element unless it says something of several; the long tests add other numbers of splits, and
single options of what the quick ones ask of all options together (LONG)."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention import triton as attention_triton
from pypar.ops.attention.arguments import AttentionProblem, Positions, attention_problem
from pypar.ops.backend import Backend
from pypar.ops.backend.gpu import TRITON_MISSING
from tests.gpu.attention.problems import check_added, check_carry, draw
from tests.ops.attention.judge import compare

needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=f"{TRITON_MISSING}")


LARGE_STEP = Positions(q_start=40, k_start=1, step=3, batch_start=2**20, head_start=5)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "T": 150, "S": 210, "B": 1},
    "causal, more queries": {"causal": True, "T": 90, "S": 40, "B": 1},
    "window": {"window": (20, 9), "B": 1},
    "window, left": {"window": (13, None), "B": 1},
    "window, causal": {"window": (33, None), "causal": True, "B": 1},
    "window, beyond": {"window": (3, 0), "T": 40, "S": 90, "positions": Positions(q_start=200)},
    "softcap": {"softcap": 2.0, "B": 1},
    "alibi": {"alibi": (2,), "causal": True, "B": 1},
    "alibi, batch": {"alibi": (2, 2)},
    "bias": {"bias": (2, 2, 70, 90)},
    "bias, broadcast": {"bias": (2, 1, 90), "causal": True},
    "sinks": {"sinks": True, "causal": True, "T": 90, "S": 70, "B": 1},
    "dropout": {"dropout_p": 0.17, "B": 1},
    "gqa": {"N": 6, "G": 2, "T": 33, "causal": True, "B": 1},
    "mqa, few queries": {"N": 8, "G": 1, "T": 2, "S": 150, "causal": True, "B": 1},
    "one query": {"T": 1, "S": 200, "B": 1},
    "sizes of heads": {"H": 40, "Hv": 72, "B": 1},
    "scale below zero": {"scale": -0.3, "causal": True, "B": 1},
    "scale zero": {"scale": 0.0, "window": (7, 7), "B": 1},
    "strides": {"transposed": True},
    "positions": {"positions": LARGE_STEP, "window": (100, 30), "alibi": (2,), "dropout_p": 0.3},
    "varlen": {"lengths": ([40, 0, 7, 33], [30, 5, 0, 70]), "causal": True},
    "varlen, all": {
        "lengths": ([1, 50, 0, 9, 1], [70, 33, 3, 9, 1]),
        "window": (25, 4),
        "softcap": 5.0,
        "alibi": (5, 2),
        "dropout_p": 0.17,
        "sinks": True,
        "N": 2,
        "G": 1,
    },
    "all": {
        "window": (40, 3),
        "softcap": 3.0,
        "alibi": (2, 2),
        "bias": (2, 2, 1, 90),
        "dropout_p": 0.17,
        "sinks": True,
        "G": 1,
        "H": 24,
        "Hv": 48,
    },
}
# Options that "all", "varlen, all" or a quick one beside them has too.
LONG = {
    "window",
    "window, left",
    "softcap",
    "alibi, batch",
    "bias",
    "sinks",
    "dropout",
    "scale zero",
    "varlen",
}


def long(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def backend_of(interpreter: Any, splits: int | None = None) -> Backend:
    def forward(problem: AttentionProblem, carry: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return interpreter.forward(problem, carry, splits)

    return Backend("triton", forward, interpreter.backward, lambda problem: None)


def problem_of(**options: Any) -> AttentionProblem:
    tensors, keywords = draw(**options)
    return attention_problem(**{name: x.detach() for name, x in tensors.items()}, **keywords)


@needs_triton
@pytest.mark.parametrize("name", [*(name for name in OPTIONS if name not in LONG), *long(*sorted(LONG))])
def test_options(interpreter, name):
    compare(backend_of(interpreter), *draw(dtype=torch.float16, **OPTIONS[name]))


@needs_triton
@pytest.mark.parametrize(
    "name",
    ["mqa, few queries", "varlen, all", *long("all", "plain", "causal", "alibi, batch", "varlen")],
)
def test_fp32(interpreter, name):
    compare(backend_of(interpreter), *draw(**OPTIONS[name]))


@needs_triton
def test_bf16(interpreter):
    """Computed in fp32 here and rounded by PyTorch."""
    compare(backend_of(interpreter), *draw(dtype=torch.bfloat16, **OPTIONS["all"]))


@needs_triton
@pytest.mark.parametrize("name", ["varlen, all", *long("plain", "gqa")])
def test_gradients_are_added(interpreter, name):
    check_added(backend_of(interpreter), *draw(**OPTIONS[name]))


@needs_triton
@pytest.mark.parametrize("name", ["varlen, all", *long("all", "plain", "mqa, few queries")])
@pytest.mark.parametrize("splits", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_programs_share_the_keys(interpreter, name, splits):
    """The split forward joins in a fixed order, and parts without keys count for nothing."""
    compare(backend_of(interpreter, splits), *draw(dtype=torch.float16, **OPTIONS[name]))


@needs_triton
@pytest.mark.parametrize("name", ["all", *long("mqa, few queries", "plain", "window")])
@pytest.mark.parametrize("splits", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_running_results(interpreter, name, splits):
    tensors, keywords = draw(dtype=torch.float16, **{"sinks": True, **OPTIONS[name]})
    S = tensors["k"].shape[1]
    check_carry(backend_of(interpreter, splits), tensors, keywords, [S // 3, 0, S - S // 3])


@needs_triton
@pytest.mark.parametrize("sizes", [(0, 9, 2), (9, 0, 2), (9, 9, 0)], ids=str)
def test_nothing_to_do(interpreter, sizes):
    T, S, B = sizes
    problem = problem_of(T=T, S=S, B=B)
    out, lse = interpreter.forward(problem, None)
    expected_out, expected_lse, _ = attention_reference.forward(problem, None)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    for gradient in interpreter.backward(problem, out, out, lse, None, None, None):
        assert not gradient.any()


@needs_triton
def test_dropout_is_the_references(interpreter):
    """With v the identity, out shows which elements are kept; their positions wrap."""
    at = Positions(q_start=-3, k_start=-1, batch_start=7, head_start=3)
    problem = problem_of(T=30, S=32, H=32, dropout_p=0.4, positions=at, dropout_seed=2**62 + 12345)
    problem.v.copy_(torch.eye(32)[None, :, None])
    out, _ = interpreter.forward(problem, None)
    expected, *_ = attention_reference.forward(problem, None)
    assert torch.equal(out == 0, expected == 0)
    assert 0.3 < (out == 0).float().mean() < 0.5


@needs_triton
def test_interpreter_is_accepted_there_and_refused_here(interpreter):
    problem = problem_of()
    assert interpreter.unsupported(problem) is None
    assert "a tensor is on the CPU" in attention_triton.unsupported(problem)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"H": 20}, r"head size \(20\) is not a multiple of 8 up to 256"),
        ({"H": 64, "Hv": 264}, r"value head size \(264\) is not"),
        ({"dtype": torch.float64}, "float64 is not one of"),
        ({"positions": Positions(q_start=2**31)}, "a position is beyond"),
    ],
)
def test_refusals(options, sentence):
    assert re.search(sentence, attention_triton.unsupported(problem_of(T=3, S=3, **options)))


def test_without_triton_it_says_so():
    """And importing the op needs no Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from pypar.ops.attention import arguments, triton\n"
        "q = torch.zeros(1, 2, 1, 8)\n"
        "print(triton.unsupported(arguments.attention_problem(q, q, q)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "triton is not installed" in result.stdout, result.stderr
