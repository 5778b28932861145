"""What differs between processors, on one: each backend and instruction set of this machine by the self-test's cases.

A machine takes one of them by itself; here each is forced, as PYPAR_BACKEND and PYPAR_ISA do, through every case.
Of attention's cases `make test` takes those of `pypar selftest --quick`, and of every operator's cases each in one
type, so that each type, backend and instruction set meets some; the long tests take every case in every type.
"""

import functools

import pytest
import torch

from pypar.ops import native
from pypar.ops.backend import RefusalError, op_modules
from pypar.selftest import judge, rows
from tests.harness.native_kernels import instruction_set

ISAS = native.module().supported_isas()
OPS = {rows.op_name(module): module for module in op_modules()}
BACKENDS = {op: [backend.name for backend in module.BACKENDS] for op, module in OPS.items()}
# Each backend with the instruction set that this machine takes, and the native ones with each of the others.
RUNS = [(op, name, ISAS[0]) for op, names in BACKENDS.items() for name in names]
RUNS += [(op, "native", isa) for op, names in BACKENDS.items() if "native" in names for isa in ISAS[1:]]
CASES = {op: rows.cases_of(op, large=False) for op in OPS}


def results(op, name, case, draws):
    ours = functools.partial(CASES[op][case].ours, backend=name)
    return [judge.results(ours, draw.inputs, draw.douts) for draw in draws]


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS)
def test_every_case_on_every_backend_and_instruction_set(op, every, dtype):
    cases = [i for i, case in enumerate(CASES[op]) if case.quick or every or op != "attention"]
    failures, ran = [], set()
    for case in cases if every else cases[rows.DTYPES.index(dtype) :: len(rows.DTYPES)]:
        draws = judge.expect_case(CASES[op][case], "cpu", dtype)
        for name, isa in [run[1:] for run in RUNS if run[0] == op]:
            try:
                with instruction_set(isa):
                    found = results(op, name, case, draws)
            except RefusalError:
                continue
            ran.add((name, isa))
            what = f"{name} {isa} {CASES[op][case].name} {CASES[op][case].shape}"
            failure = judge.judge_draws(found, draws).failure
            failures += [f"{what}: {failure}"] if failure else []
            failures += [f"{what}: {sentence}" for sentence in unlike(found[0], draws[0])]
    assert not failures, "\n".join(failures)
    if "native" in BACKENDS[op]:
        assert {isa for name, isa in ran if name == "native"} == set(ISAS)


def unlike(found, of):
    """What a backend's results have that another's may not: all are tensors of their own, of one dtype.

    They are contiguous; the gradient of an input that is not may lie as the input does.
    """
    for name, x in found.items():
        like = of.plains[0][name]
        if x.dtype != like.dtype:
            yield f"{name} is {x.dtype}, not {like.dtype}"
        given = of.inputs.get(name[1:])
        if not x.is_contiguous() and (given is None or x.stride() != given.stride()):
            yield f"{name} has strides {x.stride()}"
        if x.untyped_storage().nbytes() != x.nbytes:
            yield f"{name} is a part of a larger tensor"


@pytest.mark.parametrize("op", [op for op in OPS if op != "attention"])
def test_results_may_be_written_to(op):
    """As those of torch; attention's backward reads its result, as F.scaled_dot_product_attention's does."""
    for name in BACKENDS[op]:
        for case in CASES[op][1:3]:
            try:
                out = case.ours(**judge.draw_inputs(case, torch.float32), backend=name)
            except RefusalError:
                continue
            first = out[0] if isinstance(out, tuple) else out
            first.mul_(2)
            if case.gradients:
                first.sum().backward()
