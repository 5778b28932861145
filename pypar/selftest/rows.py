"""One row for each operator, backend, device, type and case: is it right, does it repeat, how long does it take."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from pypar.bench import timing
from pypar.ops.backend import Backend, RefusalError, op_modules
from pypar.selftest import judge
from pypar.selftest.case import Case, Function, Inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SAME_FOR_ANY_THREADS = "native"  # the backend that promises it


@dataclass(frozen=True)
class Options:
    ops: tuple[str, ...] = ()  # empty: all
    backends: tuple[str, ...] = ()
    quick: bool = False

    @property
    def budget_s(self) -> float:
        """The seconds that timing one function of one row may take."""
        return 0.02 if self.quick else 0.1


@dataclass
class Row:
    op: str
    backend: str
    device: str
    dtype: str
    case: str
    shape: str
    peer: str = ""
    result: str = ""  # the one nearest to its allowed error
    error: float | None = None
    allowed: float | None = None
    forward_ms: float | None = None
    forward_ratio: float | None = None  # the peer's time by ours
    forward_share: float | None = None  # of the rate that limits the case
    both_ms: float | None = None  # forward and backward
    both_ratio: float | None = None
    both_share: float | None = None
    limit: str = ""  # "matmul" or "copy"
    failure: str | None = None


@dataclass(frozen=True)
class NotRun:
    what: str
    reason: str


@dataclass
class Limits:
    """Rates of a device, measured when first asked for."""

    options: Options
    matmul: dict[tuple[str, str], float] = field(default_factory=dict)
    copy: dict[str, float] = field(default_factory=dict)

    def matmul_flops(self, device: str, dtype: torch.dtype) -> float:
        key = (device, name_of(dtype))
        if key not in self.matmul:
            self.matmul[key] = timing.matmul_rate(dtype, device, budget_s=3 * self.options.budget_s)
        return self.matmul[key]

    def copy_bytes(self, device: str) -> float:
        if device not in self.copy:
            self.copy[device] = timing.copy_rate(device, budget_s=3 * self.options.budget_s)
        return self.copy[device]


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def op_name(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[1]


def cases_of(op: str, large: bool) -> list[Case]:
    """Those of pypar/selftest/cases/<op>.py, of the sizes for a GPU or of those for a CPU."""
    return importlib.import_module(f"pypar.selftest.cases.{op}").cases(large)


def run(options: Options, limits: Limits) -> Iterator[Row | NotRun]:
    for module in op_modules():
        op = op_name(module)
        backends = [b for b in module.BACKENDS if not options.backends or b.name in options.backends]
        if not backends or (options.ops and op not in options.ops):
            continue
        for device in devices():
            try:
                cases = cases_of(op, large=device == "cuda")
            except ModuleNotFoundError:
                yield NotRun(op, f"it has no cases: pypar/selftest/cases/{op}.py is missing")
                break
            for dtype in DTYPES:
                for case in cases:
                    if case.quick or not options.quick:
                        yield from _rows(op, case, backends, device, dtype, limits)


def _rows(
    op: str, case: Case, backends: list[Backend], device: str, dtype: torch.dtype, limits: Limits
) -> Iterator[Row | NotRun]:
    """One for each backend."""
    what = f"{op} on {device} in {name_of(dtype)}, {case.name}"
    try:
        expected = judge.expect_case(case, device, dtype)
    except Exception as error:
        yield NotRun(what, f"plain PyTorch fails: {_sentence(error)}")
        return
    for backend in backends:
        row = Row(op, backend.name, device, name_of(dtype), case.name, case.shape, case.peer.name)
        try:
            _fill(row, case, expected, limits)
        except RefusalError as refusal:
            yield NotRun(f"{op} {backend.name} on {device}", refusal.reason)
            continue
        except Exception as error:
            row.failure = _sentence(error)
        yield row
    if device == "cuda":
        del expected
        torch.cuda.empty_cache()


def _fill(row: Row, case: Case, draws: list[judge.Expected], limits: Limits) -> None:
    ours = functools.partial(case.ours, backend=row.backend)
    results = [judge.results(ours, draw.inputs, draw.douts) for draw in draws]
    judgement = judge.judge_draws(results, draws)
    row.result, row.error, row.allowed = judgement.result, judgement.error, judgement.allowed
    expected = draws[0]
    row.failure = judgement.failure or _repeats(row, results[0], ours, expected)
    if row.failure:
        return
    # The reference is written to be read: one look at its time is enough.
    budget_s = 0.0 if row.backend == "reference" else limits.options.budget_s
    (forward, *both), peer = times(case, ours, expected, row.device, budget_s)
    least_forward_s, least_both_s, row.limit = least_seconds(case, expected, row.device, limits)
    row.forward_ms, row.forward_share = forward * 1e3, least_forward_s / forward
    if both:
        row.both_ms, row.both_share = both[0] * 1e3, least_both_s / both[0]
    if peer:
        row.forward_ratio = peer[0] / forward
        row.both_ratio = peer[1] / both[0] if both else None


def times(
    case: Case, ours: Function, expected: judge.Expected, device: str, budget_s: float
) -> tuple[list[float], list[float]]:
    """Seconds of ours and of the peer, forward, then forward and backward. The peer's are empty where it cannot."""
    turns = [{"ours": call} for call in contenders(case, ours, expected.inputs, expected.douts)]
    try:
        peers = contenders(case, case.peer.call, case.peer.prepare(expected.inputs))
        peers[-1]()
        for turn, peer in zip(turns, peers, strict=True):
            turn["peer"] = peer
    except RuntimeError:  # such as a function that this torch lacks for the device or dtype
        pass
    medians = [timing.median_seconds(turn, device, budget_s=budget_s) for turn in turns]
    return [m["ours"] for m in medians], [m["peer"] for m in medians if "peer" in m]


def contenders(
    case: Case, function: Function, inputs: Inputs, douts: list[torch.Tensor] | None = None
) -> list[Callable[[], object]]:
    """Calls of forward, and, where the case has gradients, of forward and backward. Without douts, they are drawn."""
    differentiable = judge.leaves(inputs, case.gradients)
    wanted = [x for x in differentiable.values() if x.requires_grad]
    if douts is None:
        douts = [torch.randn_like(out) for out in judge.outputs(function, inputs)]

    def both() -> object:
        return torch.autograd.grad(function(**differentiable), wanted, douts)

    calls: list[Callable[[], object]] = [lambda: judge.outputs(function, inputs)]
    return [*calls, both] if wanted else calls


def _repeats(row: Row, first: judge.Results, ours: Function, expected: judge.Expected) -> str | None:
    """A second run must give the same bits, and so must one thread where the backend promises it."""
    different = judge.differs(first, judge.results(ours, expected.inputs, expected.douts))
    if different:
        return f"another run gives another {different}"
    num_threads = torch.get_num_threads()
    if row.backend != _SAME_FOR_ANY_THREADS or num_threads == 1:
        return None
    torch.set_num_threads(1)
    try:
        different = judge.differs(first, judge.results(ours, expected.inputs, expected.douts))
    finally:
        torch.set_num_threads(num_threads)
    return f"one thread gives another {different} than {num_threads}" if different else None


def least_bytes(case: Case, expected: judge.Expected) -> tuple[int, int]:
    """What forward, and backward, must read and write."""
    read = sum(x.nbytes for x in expected.inputs.values())
    read_again = read - sum(expected.inputs[name].nbytes for name in case.unread)
    written = sum(x.nbytes for x in expected.douts)
    gradients = sum(expected.inputs[name].nbytes for name in case.gradients)
    return read + written, written + read_again + gradients


def least_seconds(
    case: Case, expected: judge.Expected, device: str, limits: Limits
) -> tuple[float, float, str]:
    """What forward, and forward and backward, take at the device's rates; and the rate that limits."""
    forward, backward = least_bytes(case, expected)
    copy = limits.copy_bytes(device)
    moving = forward / copy, (forward + backward) / copy
    if not case.flops[0]:
        return *moving, "copy"
    matmul = limits.matmul_flops(device, next(iter(expected.inputs.values())).dtype)
    computing = case.flops[0] / matmul, sum(case.flops) / matmul
    return (
        max(moving[0], computing[0]),
        max(moving[1], computing[1]),
        "matmul" if computing[0] > moving[0] else "copy",
    )


def _sentence(error: Exception) -> str:
    """Its first line, with the kind."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
