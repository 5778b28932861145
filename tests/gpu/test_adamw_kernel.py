"""adamw's Triton kernel without a GPU: the bits of the definition, from Triton's interpreter and from its PTX."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from pypar.ops.backend.gpu import TRITON_MISSING

if TRITON_MISSING is not None:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from pypar.bench.gpu.triton_code import compile_launch, machine_code
from pypar.kernels.launch import Launch, launches_go_to
from pypar.ops.adamw import Blocks, Place, adamw
from pypar.selftest.cases import adamw as cases
from tests.harness import row_kernels

PTXRUN = os.environ.get("PYPAR_PTXRUN")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGE = (1 << 32) - 300  # where the upper half of the elements' numbers changes


def tensors(state: dict[str, list]) -> dict[str, torch.Tensor]:
    return {
        f"{name}{i}.{j}": x
        for name, column in state.items()
        for i, kept in enumerate(column)
        for j, x in enumerate(kept if isinstance(kept, Blocks) else (kept,))
    }


def state_of(counts: tuple[int, ...], form: cases.Form, dtype: torch.dtype) -> dict[str, list]:
    """What adamw takes, for a tensor of each size; in the second a gradient is missing, and another infinite."""
    states = [cases.state(count, form, dtype, seed=i) for i, count in enumerate(counts)]
    for state in states[1:2]:
        state["gradients"][0][5], state["gradients"][0][40] = torch.nan, -torch.inf
    return {name: sum((state[name] for state in states), []) for name in states[0]}


def updated(
    backend: str, counts: tuple[int, ...], form: cases.Form, dtype: torch.dtype, **options: Any
) -> dict[str, torch.Tensor]:
    """All tensors after two updates."""
    state = state_of(counts, form, dtype)
    places = [Place(EDGE + 50 * i, 20, 33) for i in range(len(counts))]
    for step in (1, 2):
        update = replace(cases.UPDATE, step=step, seed=form.seed)
        adamw(**state, update=update, places=places, backend=backend, **options)
    return tensors(state)


def check_bits(
    counts: tuple[int, ...], form: cases.Form, dtype: torch.dtype, found_inf: float | None = None
) -> None:
    """AssertionError where a bit differs from the definition's; a missing number is like another."""
    options = {
        "scale": torch.tensor([0.7]),
        "found_inf": None if found_inf is None else torch.tensor(found_inf),
    }
    found = updated("triton", counts, form, dtype, **options)
    for name, expected in updated("reference", counts, form, dtype, **options).items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name
        assert torch.equal(found[name].nan_to_num(), expected.nan_to_num()), name


def by_dtype(quick: tuple[Any, ...]) -> list[Any]:
    """Forms and dtypes, of which those that are not quick are long tests."""
    return [
        pytest.param(form, dtype, marks=() if (form, dtype) in quick else pytest.mark.slow)
        for form in cases.FORMS
        for dtype in DTYPES
    ]


def named(value: Any) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(
    ("form", "dtype"),
    by_dtype(
        tuple((form, torch.bfloat16) for form in cases.FORMS)
        + ((cases.PLAIN, torch.float32), (cases.MASTER, torch.float16))
    ),
    ids=named,
)
def test_interpreted_bits_are_those_of_the_definition(interpreter, form, dtype):
    """Of tensors in one launch whose loads are wide, and in another whose loads are not; one has two chunks."""
    interpreter.call(check_bits, (1040, 63, 0, 17_000 if dtype == torch.bfloat16 else 16, 1), form, dtype)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_an_infinity_changes_nothing(interpreter, found_inf):
    interpreter.call(check_bits, (300,), cases.EIGHT_BITS, torch.bfloat16, found_inf)


@pytest.mark.skipif(not PTXRUN, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun")
@pytest.mark.parametrize(("form", "dtype"), by_dtype(((cases.EIGHT_BITS, torch.bfloat16),)), ids=named)
def test_ptx_has_the_bits_of_the_definition(monkeypatch, form, dtype):
    monkeypatch.syspath_prepend(PTXRUN)
    with launches_go_to(row_kernels.runner_of_ptx(80)):
        check_bits((304, 63), form, dtype)


def launches(counts: tuple[int, ...], form: cases.Form, dtype: torch.dtype) -> list[Launch]:
    found: list[Launch] = []
    state = state_of(counts, form, dtype)
    with launches_go_to(found.append):
        adamw(**state, update=replace(cases.UPDATE, seed=form.seed), backend="triton")
    return found


def test_many_tensors_take_few_launches():
    """Those whose sizes are multiples of 16, and the others."""
    assert len(launches((48,) * 500 + (15, 3), cases.PLAIN, torch.float32)) == 2
    assert len(launches((48,) * 600, cases.PLAIN, torch.float32)) == 2
    assert not launches((0,), cases.PLAIN, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", cases.FORMS, ids=named)
def test_compiled_code_moves_16_bytes_at_once_and_spills_nothing(form, dtype, capability, tmp_path):
    for launch in launches((4096, 63), form, dtype):
        compiled = compile_launch(launch, capability)
        code = machine_code(compiled, tmp_path)
        assert code.spills == 0 and code.stack_bytes == 0, code
        assert ".v4.b32" in compiled.asm["ptx"] or not launch.arguments["ALIGNED"]
        assert "fma.rn.f32" not in compiled.asm["ptx"]
