"""Whether a cut model computes what the whole one does: outputs and gradients of a few inputs, on the real ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pypar.axis import Axis
from pypar.comm import all_reduce_start
from pypar.layout import layout_of, local_part, local_tensor
from pypar.mesh import Mesh
from pypar.parallel.regions import Inside, Region, listed
from pypar.parallel.roles import ROLES
from pypar.parallel.trial.examples import Verify, results, wave
from pypar.parallel.trial.frozen import frozen_partial
from pypar.parallel.trial.shapes import first_line, innermost, remedy
from pypar.parallel.trial.together import PeerFailedError, Together, every_rank, quiet
from pypar.parallel.trial.unchanged import noise, seed, unchanged

if TYPE_CHECKING:
    from pypar.parallel.rules import Reading
    from pypar.role import Spreading

Call: TypeAlias = Callable[[nn.Module], Any]
Spread: TypeAlias = "Callable[[Spreading, Reading], None]"
# Relative errors in the 2-norm. A right cut differs by rounding, 1e-6 to 1e-5 in fp32 (in which models keep their
# norms in fp64 too) and some 1e-2 in bf16; a gradient that lacks a rank's part, or is another head's, differs by
# about as much as it is large.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _Run(NamedTuple):
    """What one forward and backward gave: outputs, outputs of regions by name, gradients by parameter name."""

    outputs: list[Tensor]
    regions: dict[str, Tensor]
    gradients: dict[str, Tensor]


def partial_gradients(
    spreading: Spreading,
    reading: Reading,
    verify: Verify,
    call: Call | None,
    spread: Spread,
    notes: list[str],
) -> list[nn.Parameter]:
    """The parameters beside cut layers of which each rank gets a part of the gradient; checks all others.

    Measured where ``verify`` asks for a check or, at None, where the plan is not known to be complete; else as the
    plan and the shapes say. ``spread`` puts the cut layers into the model. ValueError where the cut model is wrong, or
    where neither measuring nor the plan tells.
    """
    model, mesh = spreading.model, _mesh(spreading)
    why = "verify is False"
    insides = list({id(i.parameter): i for region in reading.regions for i in region.insides}.values())
    if not reading.is_complete if verify is None else verify is not False:
        device = next(model.parameters()).device
        outcome: str | list[nn.Parameter]
        if device.type == "meta":
            outcome = "it is on the meta device"
        elif _cuts_positions(spreading, reading):
            outcome = (
                "positions are cut as well; verify the plan without sequence_parallel on a mesh without cp, and then "
                "pass verify=False"
            )
        elif call is None:
            outcome = (
                "its inputs are not known; pass verify=(x,), verify={name: x} or verify=function of the model"
            )
        elif not every_rank((spreading.over(reading.axes), mesh.data), _has_memory(model, device), device):
            outcome = "the gradients of the whole model do not fit into memory"
        else:
            with unchanged(model), noise(model), torch.enable_grad():
                outcome = _measured(spreading, reading, insides, call, spread)
        if not isinstance(outcome, str):
            return outcome + frozen_partial(type(model).__name__, insides)
        if verify is not None:
            raise ValueError(
                f"parallelize cannot check this {type(model).__name__} as verify asks: {outcome}"
            )
        why = outcome
        notes.append(f"parallelize did not compare this {type(model).__name__} with the whole one: {outcome}")
    unknown = [i.name for i in insides if i.certainty == "unknown"]
    if unknown and not reading.is_given:
        raise ValueError(
            f"parallelize does not know {listed(unknown)}, which stands beside layers that it cuts, and has not "
            f"measured its gradient: {why}. Let it verify, or give a plan"
        )
    return [i.parameter for i in insides if i.certainty != "unknown"]


def _measured(
    spreading: Spreading, reading: Reading, insides: Sequence[Inside], call: Call, spread: Spread
) -> list[nn.Parameter] | str:
    """The parameters whose gradients the ranks have in parts; a reason where the whole model cannot be run."""
    model, mesh, axis = spreading.model, _mesh(spreading), spreading.over(reading.axes)
    device = next(model.parameters()).device
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
    where_of = {id(p): name for name, p in model.named_parameters()}
    kind = type(model).__name__
    whole, error = _attempt(model, reading.regions, call, names)
    if not every_rank((axis, mesh.data), error is None, device):
        return f"the whole model does not run on a few inputs ({first_line(error) if error else 'on another rank'})"
    assert whole is not None
    if not whole.outputs:
        return "it returns no tensor of floating-point numbers"
    if not all(bool(x.isfinite().all()) for x in whole.outputs):
        return "the outputs of the whole model are not finite"
    trial_axis = replace(axis, traffic=Together(axis, device))
    spread(replace(spreading, instead={reading.axes: trial_axis}), reading)
    weights = dict(model.named_parameters(remove_duplicate=False))
    whole = whole._replace(
        gradients={name: local_part(x, layout_of(weights[name]), mesh) for name, x in whole.gradients.items()}
    )
    actual, error = _attempt(model, reading.regions, call, names, whole, axis)
    is_elsewhere = error is None or isinstance(error, PeerFailedError)
    if not every_rank(
        (axis, mesh.data), error is None, device, has_failed_together=is_elsewhere and error is not None
    ):
        where = "" if is_elsewhere or error is None else innermost(model, error)
        what = f"in {where} {first_line(error)}" if where and error else "another rank's error says why"
        raise ValueError(
            f"this {kind}, cut over {axis.name}, does not run: {what}. {remedy(reading, where)}"
        ) from error
    assert actual is not None
    certainty = {where_of[id(i.parameter)]: i for i in insides if i.parameter.requires_grad}
    return _judged(kind, reading, certainty, (axis, mesh.data), whole, actual)


def _cuts_positions(spreading: Spreading, reading: Reading) -> bool:
    """Whether ranks will have parts of the sequences, which the whole model has whole."""
    others = (ROLES[match.role] for match in reading.matches if ROLES[match.role].axes != reading.axes)
    return spreading.sequence_parallel or any(spreading.axis(role).size > 1 for role in others)


def _mesh(spreading: Spreading) -> Mesh:
    assert spreading.mesh is not None, "what is spread has a mesh"
    return spreading.mesh


def _judged(
    kind: str,
    reading: Reading,
    insides: dict[str, Inside],
    axes: tuple[Axis, Axis],
    whole: _Run,
    actual: _Run,
) -> list[nn.Parameter]:
    """The parameters of which each rank has a part of the gradient; ValueError where something is not as in the
    whole model. Every rank comes to the same result, by the largest error of all ranks of both axes, of which features
    are cut over the first."""
    axis = axes[0]
    pairs = [(x, _part(y, x.shape, axis)) for x, y in zip(actual.outputs, whole.outputs, strict=True)]
    names, regions = list(actual.gradients), [n for n in actual.regions if n in whole.regions]
    dtypes = {x.dtype for x in (*actual.outputs, *actual.gradients.values())}
    allowed = max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in dtypes)
    # Some gradients are only rounding (a key's bias before softmax): of the largest, so much counts as nothing.
    floor = allowed * max((_rms(x) for x in whole.gradients.values()), default=0.0)
    summed = [all_reduce_start(actual.gradients[n].clone(), quiet(axis)).wait() for n in insides]
    errors = [_error(x, y, 0.0) for x, y in pairs]
    errors += [_error(actual.regions[n], whole.regions[n], 0.0) for n in regions]
    errors += [_error(actual.gradients[n], whole.gradients[n], floor) for n in names]
    errors += [_error(x, whole.gradients[n], floor) for n, x in zip(insides, summed, strict=True)]
    everywhere = torch.tensor(errors, dtype=torch.float64, device=actual.outputs[0].device)
    for each in axes:
        everywhere = all_reduce_start(everywhere, quiet(each), dist.ReduceOp.MAX).wait()
    left = iter(everywhere.tolist())
    output_errors = [next(left) for _ in pairs]
    region_errors, alone, in_sum = ({n: next(left) for n in group} for group in (regions, names, insides))

    partial, wrong = [], []
    for name, error in alone.items():
        inside = insides.get(name)
        if inside is None:
            if error > allowed:
                wrong.append(name)
        elif inside.certainty == "unknown" and error <= allowed:
            continue
        elif in_sum[name] <= allowed:
            partial.append(inside.parameter)
        elif inside.certainty == "declared" or error > allowed:
            wrong.append(name)
    if max(output_errors) > allowed:
        where = next((n for n in regions if region_errors[n] > allowed), "")
        what = f"its outputs differ by {max(output_errors):.2g} of their size{f', first in {where}' if where else ''}"
    elif wrong:
        where = next((n for n in reversed(wrong) if n in insides), wrong[-1])
        what = f"the gradient of {where} differs by {alone[where]:.2g} of its size"
    else:
        return partial
    raise ValueError(
        f"this {kind}, cut over {axis.name}, is not the whole model: {what} (allowed {allowed:g}). "
        f"{remedy(reading, where)}"
    )


def _attempt(
    model: nn.Module,
    regions: Sequence[Region],
    call: Call,
    names: Sequence[str],
    whole: _Run | None = None,
    axis: Axis | None = None,
) -> tuple[_Run | None, Exception | None]:
    """One forward and one backward of sum(outputs * fixed weights) / sqrt(number of outputs), or what it raised."""
    seen: dict[str, Tensor] = {}
    seed(model)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for x in results(output)[:1]:
                seen.setdefault(name, x.detach())

        return hook

    with ExitStack() as stack:
        for region in regions:
            stack.callback(region.module.register_forward_hook(watch(region.name)).remove)
        try:
            outputs = results(call(model))
            parameters = dict(model.named_parameters(remove_duplicate=False))
            objective: Any = 0.0
            for i, x in enumerate(outputs):
                shape = x.shape if whole is None else whole.outputs[i].shape
                weights = wave(shape) if axis is None else _part(wave(shape), x.shape, axis)
                objective = objective + (x * weights.to(x)).sum() / max(x.numel(), 1) ** 0.5
            chosen = [parameters[name] for name in names]
            has_graph = isinstance(objective, Tensor) and objective.requires_grad and chosen
            gradients = (
                torch.autograd.grad(objective, chosen, allow_unused=True)
                if has_graph
                else [None] * len(chosen)
            )
        except Exception as error:
            return None, error
    filled = [
        torch.zeros_like(local_tensor(p)) if g is None else local_tensor(g)
        for g, p in zip(gradients, chosen, strict=True)
    ]
    return _Run([x.detach() for x in outputs], seen, dict(zip(names, filled, strict=True))), None


def _part(whole: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    """This rank's part of a whole tensor, where ``shape`` says that it has one."""
    for dim, (total, length) in enumerate(zip(whole.shape, shape, strict=False)):
        if total == length * axis.size and total != length:
            return whole.chunk(axis.size, dim)[axis.rank].clone()
    return whole


def _error(actual: Tensor, whole: Tensor, floor: float) -> float:
    """Relative error in the 2-norm; infinite for a shape of another kind or numbers that are not finite."""
    if actual.shape != whole.shape:
        return float("inf")
    size = float(torch.linalg.vector_norm(whole)) + floor * whole.numel() ** 0.5
    error = float(torch.linalg.vector_norm(actual - whole))
    return error / size if error and size and error < float("inf") else (float("inf") if error else 0.0)


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / max(x.numel(), 1) ** 0.5


def _has_memory(model: nn.Module, device: torch.device) -> bool:
    """Whether the gradients of the whole model, and as much again for the cut one, fit beside what is there."""
    needed = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return True  # not Linux: nothing says how much there is
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return needed * ranks_here < free
