"""How a backend's attention is judged: out, lse and every gradient against plain attention's, by the error rule."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.ops.attention import attention
from pypar.ops.attention import reference as attention_reference
from pypar.ops.attention.arguments import attention_problem
from pypar.ops.backend import Backend
from pypar.selftest.cases.attention.plain import plain_attention
from pypar.selftest.judge import Expected, Judgement, expect, judge_result, largest, outputs_and_gradients
from tests.ops.attention.matrix import Case, operands

DRAWS = 4


def run(backend: str | Backend, case: Case, device: str = "cpu") -> None:
    """Compares out, lse and every gradient with plain attention's.

    backend: a name of pypar.attention's; or a Backend, of which forward and backward are called (a native module
    that a test has built, kernels in an interpreter).

    The largest error of one draw of the operands is a matter of luck (pypar/selftest/judge.py), the more so of a few
    numbers; the reference itself has 1.3 times the allowed one in 3 of 132 cases in fp32. Where one draw exceeds the
    rule, the largest errors over DRAWS decide, the backend's and plain attention's.
    """
    of_draws = [list(_judgements(backend, *_of_case(case), device, False))]
    if any(judgement.failure for judgement in of_draws[0]):
        for turn in range(1, DRAWS):
            tensors, keywords = operands(case, turn)
            of_draws.append(list(_judgements(backend, tensors, keywords, None, device, False)))
    for judgements in zip(*of_draws, strict=True):
        largest(judgements).check()


@functools.lru_cache(maxsize=2)  # tests of one case by several backends stand one behind the other
def _of_case(case: Case) -> tuple[dict[str, Tensor], dict, Asked]:
    tensors, keywords = operands(case)
    return tensors, keywords, ask(tensors, keywords)


@dataclass(frozen=True)
class Asked:
    """The gradients of out and lse for which plain attention was asked, and what it answered."""

    dout: Tensor
    dlse: Tensor
    expected: Expected


def ask(tensors: dict[str, Tensor], keywords: dict) -> Asked:
    *batch, T, N, _ = tensors["q"].shape
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(*batch, T, N, tensors["v"].shape[-1], generator=generator).to(tensors["q"].dtype)
    dlse = torch.randn(*batch, N, T, generator=generator)
    plain = functools.partial(plain_attention, **keywords)
    return Asked(dout, dlse, expect(plain, tensors, [dout, dlse], beside=("dsinks",)))


def compare(
    backend: str | Backend,
    tensors: dict[str, Tensor],
    keywords: dict,
    asked: Asked | None = None,
    device: str = "cpu",
    sinks_by_the_rule: bool = False,
) -> None:
    """The rule of `run` for any operands."""
    for judgement in _judgements(backend, tensors, keywords, asked, device, sinks_by_the_rule):
        judgement.check()


def _judgements(
    backend: str | Backend,
    tensors: dict[str, Tensor],
    keywords: dict,
    asked: Asked | None,
    device: str,
    sinks_by_the_rule: bool,
) -> Iterator[Judgement]:
    """One for each result but the gradient of sinks, which has a rule of its own."""
    asked = asked or ask(tensors, keywords)
    dout, dlse, expected = asked.dout, asked.dlse, asked.expected
    outputs, gradients = _results(backend, tensors, keywords, [dout, dlse], device)
    for i, name in enumerate(("out", "lse")):
        plains = [plain[name] for plain in expected.plains]
        yield judge_result(name, outputs[i], plains, expected.exact[name])
    assert gradients.keys() == {name for name, x in tensors.items() if x.requires_grad}
    corrected = _given_out(tensors, keywords, asked, outputs[0])
    for name, gradient in gradients.items():
        if name == "sinks" and not sinks_by_the_rule:
            check_sinks(gradient, tensors["sinks"], dout, dlse, *outputs)
            continue
        of = f"d{name}"
        plains, exact = [plain[of] for plain in expected.plains], expected.exact[of]
        judgement = judge_result(of, gradient, plains, exact, gradient=True)
        if judgement.failure and name in corrected:
            # Plain attention is judged by the out that it returned itself.
            judgement = judge_result(of, gradient, plains, corrected[name], gradient=True, plain_exact=exact)
        yield judgement


def _given_out(tensors: dict[str, Tensor], keywords: dict, asked: Asked, out: Tensor) -> dict[str, Tensor]:
    """The exact gradients for the out that was returned, of what `_differences` names."""
    names = _differences(tensors)
    if not names:
        return {}
    lost = (asked.dout.double() * (asked.expected.exact["out"] - out)).sum(-1).mT
    plain = functools.partial(plain_attention, **keywords)
    found = outputs_and_gradients(plain, tensors, [asked.dout, asked.dlse + lost], double=True)[1]
    return {name: found[name] for name in names}


def _differences(tensors: dict[str, Tensor]) -> set[str]:
    """Whose gradients are small differences of large terms, of which one is sum(dout * out).

    The out that is saved is rounded, so that not even exact arithmetic would keep the rule there (the reference does
    not). They may be compared with the exact gradients for the out that was returned. So it is with up to three keys,
    and with a bias that all of a row's keys share, whose gradient is the sum of a softmax's gradient.
    """
    chosen = {"q", "k", "bias"} if tensors["k"].shape[-3] <= 3 else set()
    if "bias" in tensors and tensors["bias"].shape[-1] == 1:
        chosen.add("bias")
    return chosen & tensors.keys()


def check_sinks(dsinks: Tensor, sinks: Tensor, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Against fp64 for the out and lse that were returned, which are judged by the rule.

    The error of plain attention's few numbers, sums over all rows, is too much a matter of luck to be a measure;
    test_sinks_of_many_heads measures by it.
    """
    weights = (sinks.detach().double()[:, None] - lse).exp()
    terms = weights * (dlse - (dout.double() * out).sum(-1).mT)
    exact, size = (x.sum(-1) if x.dim() == 2 else x.sum((0, 2)) for x in (terms, terms.abs()))
    assert ((dsinks - exact).abs() <= 2**-20 * (size + weights.sum())).all(), "dsinks"


def _results(
    backend: str | Backend, tensors: dict[str, Tensor], keywords: dict, douts: list[Tensor], device: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    def there(x: object) -> object:
        return x.to(device) if isinstance(x, Tensor) else x

    moved = {name: there(x.detach()).requires_grad_(x.requires_grad) for name, x in tensors.items()}
    keywords = {name: there(x) for name, x in keywords.items()}
    if isinstance(backend, str):
        outputs, gradients = outputs_and_gradients(
            lambda **x: attention(**x, **keywords, return_lse=True, backend=backend),
            moved,
            [there(x) for x in douts],
        )
    else:
        outputs, gradients = _by_hand(backend, moved, keywords, [there(x) for x in douts])
    return [x.cpu() for x in outputs], {name: x.cpu() for name, x in gradients.items()}


@torch.no_grad()
def _by_hand(
    backend: Backend, tensors: dict[str, Tensor], keywords: dict, douts: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the operator does around a backend."""
    problem = attention_problem(**tensors, **keywords)
    out, lse, *rest = backend.forward(problem, None)
    dbias = None if problem.bias is None else out.new_zeros(problem.scores_shape, dtype=lse.dtype)
    assert backend.backward is not None
    gradients = backend.backward(problem, douts[0], out, lse, douts[1], None, dbias, *rest)
    named = dict(zip(("q", "k", "v"), gradients, strict=True))
    if problem.sinks is not None:
        named["sinks"] = attention_reference.sinks_gradient(problem.sinks, douts[0], out, lse, douts[1])
    if problem.bias is not None and dbias is not None:
        named["bias"] = dbias.sum_to_size(problem.bias.shape).to(problem.bias.dtype)
    return [out, lse], named
