"""Who decides which backend runs, and what is said when none can."""

import dataclasses
import warnings

import pytest
import torch

from pypar.ops import backend as backend_module
from pypar.ops.backend import Backend, choose, op_modules


def _refuses(reason):
    return lambda **args: reason


FAST = Backend("fast", lambda x: x, None, _refuses(None))
PICKY = Backend("picky", lambda x: x, None, _refuses("x is odd"))
REFERENCE = Backend("reference", lambda x: x, None, _refuses(None))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PYPAR_BACKEND", raising=False)


def test_takes_the_first_that_does_not_refuse():
    assert choose("op", (PICKY, FAST, REFERENCE), {"x": 1}, None) is FAST


def test_the_argument_has_the_first_word(monkeypatch):
    monkeypatch.setenv("PYPAR_BACKEND", "fast")
    assert choose("op", (PICKY, FAST, REFERENCE), {"x": 1}, "reference") is REFERENCE


def test_the_variable_has_the_second_word(monkeypatch):
    monkeypatch.setenv("PYPAR_BACKEND", "reference")
    assert choose("op", (PICKY, FAST, REFERENCE), {"x": 1}, None) is REFERENCE


def test_the_variable_is_for_operators_that_have_the_backend(monkeypatch):
    monkeypatch.setenv("PYPAR_BACKEND", "native")
    assert choose("op", (FAST, REFERENCE), {"x": 1}, None) is FAST


def test_a_variable_that_no_operator_knows_is_an_error(monkeypatch):
    monkeypatch.setenv("PYPAR_BACKEND", "natvie")
    with pytest.raises(ValueError, match="PYPAR_BACKEND: unknown backend 'natvie'.*did you mean 'native'"):
        choose("op", (FAST, REFERENCE), {"x": 1}, None)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="op: unknown backend 'fsat', known are fast, reference; did you mean 'fast'"
    ):
        choose("op", (FAST, REFERENCE), {"x": 1}, "fsat")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_named_backend_that_refuses_is_an_error_with_its_reason(monkeypatch, by_variable):
    if by_variable:
        monkeypatch.setenv("PYPAR_BACKEND", "picky")
    with pytest.raises(ValueError, match="'picky' refuses: x is odd; name another of 'picky', 'reference'"):
        choose("op", (PICKY, REFERENCE), {"x": 1}, None if by_variable else "picky")


def test_when_all_refuse_every_reason_is_listed():
    other = Backend("other", lambda x: x, None, _refuses("x is red"))
    with pytest.raises(ValueError, match="op: every backend refuses: picky: x is odd; other: x is red"):
        choose("op", (PICKY, other), {"x": 1}, None)


@dataclasses.dataclass
class _Record:
    weight: torch.Tensor | None
    x: torch.Tensor


class _OnGpu(torch.Tensor):
    """A tensor whose metadata says cuda, for a machine that has none."""

    device = torch.device("cuda:0")


def test_the_reference_on_a_gpu_warns_once():
    backend_module._warn_once.cache_clear()
    x = torch.zeros(1).as_subclass(_OnGpu)
    with pytest.warns(
        UserWarning, match=r"pypar\.op runs its plain PyTorch reference on cuda.*picky: x is odd"
    ):
        choose("op", (PICKY, REFERENCE), {"x": x}, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("op", (PICKY, REFERENCE), {"x": x}, None)
        choose("op", (PICKY, REFERENCE), {"x": torch.zeros(1)}, None)


def test_operators_are_found_without_a_list():
    names = {module.__name__.rsplit(".", 1)[1] for module in op_modules()}
    assert names >= {"cross_entropy", "gated", "linear", "rms_norm", "rope"}


@pytest.mark.parametrize("within", [lambda x: [1, [x]], lambda x: _Record(None, x)], ids=["list", "record"])
def test_the_warning_finds_tensors_within_other_arguments(within):
    backend_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"pypar\.op runs its plain PyTorch reference on cuda"):
        choose("op", (PICKY, REFERENCE), {"problem": within(torch.zeros(1).as_subclass(_OnGpu))}, None)


@pytest.mark.parametrize(("variable", "expected"), [("", 1), ("reference", 2)])
def test_choice_is_traced_by_compile(monkeypatch, variable, expected):
    """The variable counts as it is when the function is compiled."""
    monkeypatch.setenv("PYPAR_BACKEND", variable)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + (1 if choose("op", (PICKY, FAST, REFERENCE), {"x": x}, None).name == "fast" else 2)

    assert function(torch.zeros(1)).item() == expected
