"""What one update of AdamW is told: its numbers, where elements are in a whole, and the tensors, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pypar.ops.adamw.blocks import BLOCK, Blocks

Moments = Sequence[Tensor] | Sequence[Blocks]


@dataclass(frozen=True)
class Update:
    """The numbers of an update, which all its tensors share.

    step      how many updates have been made when this one has, from 1
    seed      None: all is rounded to nearest. A number: a bf16 parameter that has no master, and a second moment in
              bf16, are rounded stochastically by numbers that the seed, the step and each element's place determine
    """

    step: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        beta1, beta2 = self.betas
        if self.step < 1 or self.lr < 0 or self.eps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"step ({self.step}) must be at least 1, lr ({self.lr}), eps ({self.eps}) and weight_decay "
                f"({self.weight_decay}) at least 0"
            )
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas {self.betas} must both be in [0, 1)")


class Place(NamedTuple):
    """Where a tensor's elements are in a whole, such as the model.

    Element i is number first + i // run * stride + i % run of the whole.

    A part that dim 1 of a matrix [rows, columns] was cut into has runs of its own number of columns, `columns` apart.
    """

    first: int
    run: int
    stride: int


class AdamwProblem(NamedTuple):
    """The operator's arguments; lists of no tensors stand for what is not there."""

    params: list[Tensor]
    gradients: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avg_absmaxes: list[Tensor]
    exp_avg_sq_absmaxes: list[Tensor]
    scale: Tensor | None
    found_inf: Tensor | None
    factor: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    seed: int | None
    places: list[int]

    @classmethod
    def example(cls, x: Tensor) -> AdamwProblem:
        """The first update of x alone, with moments of its dtype: what `pypar doctor` asks the backends about."""
        return problem_of([x], [x], [x], [x], Update(step=1, lr=1e-3), None, 1.0, None, None)

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """The lists of tensors, in this order."""
        return self[:7]

    @property
    def in_blocks(self) -> bool:
        """Whether the moments are in 8 bits."""
        return bool(self.exp_avg_absmaxes)

    def place(self, index: int) -> Place:
        return Place(*self.places[3 * index : 3 * index + 3])


def one_after_another(params: Sequence[Tensor]) -> list[Place]:
    """Each tensor's elements follow those of the tensors before it."""
    places, first = [], 0
    for param in params:
        places.append(Place(first, max(1, param.numel()), 0))
        first += param.numel()
    return places


def problem_of(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Moments,
    exp_avg_sqs: Moments,
    update: Update,
    masters: Sequence[Tensor] | None,
    scale: float | Tensor,
    found_inf: Tensor | None,
    places: Sequence[Place] | None,
) -> AdamwProblem:
    """ValueError where the tensors do not belong together."""
    codes, absmaxes = zip(_split("exp_avgs", exp_avgs), _split("exp_avg_sqs", exp_avg_sqs), strict=True)
    columns: dict[str, list[Tensor]] = {
        "params": list(params),
        "gradients": list(gradients),
        "masters": list(masters or ()),
        "exp_avgs": codes[0],
        "exp_avg_sqs": codes[1],
    }
    _check_columns(columns, absmaxes)
    for name, number in (("scale", scale), ("found_inf", found_inf)):
        if isinstance(number, Tensor) and number.numel() != 1:
            raise ValueError(f"{name} {tuple(number.shape)} must be one number")
    if places is not None and len(places) != len(params):
        raise ValueError(
            f"there must be a place for each of {len(params)} params, and there are {len(places)}"
        )
    factor = 1.0 if isinstance(scale, Tensor) else float(scale)
    return AdamwProblem(
        *columns.values(),  # type: ignore[arg-type, call-arg]
        *absmaxes,
        scale if isinstance(scale, Tensor) else None,
        found_inf,
        -factor if update.maximize else factor,
        update.lr,
        *update.betas,
        update.eps,
        update.weight_decay,
        update.step,
        update.seed,
        [number for place in places or one_after_another(params) for number in place],
    )


def _split(name: str, moments: Moments) -> tuple[list[Tensor], list[Tensor]]:
    blocks = [moment for moment in moments if isinstance(moment, Blocks)]
    plain = [moment for moment in moments if isinstance(moment, Tensor)]
    if blocks and plain:
        raise ValueError(f"{name} must all be tensors or all Blocks; call adamw once for each kind")
    if blocks:
        return [moment.codes for moment in blocks], [moment.absmax for moment in blocks]
    return plain, []


def _check_columns(columns: dict[str, list[Tensor]], absmaxes: tuple[list[Tensor], ...]) -> None:
    params = columns["params"]
    for name, column in columns.items():
        if len(column) != len(params) and not (name == "masters" and not column):
            raise ValueError(
                f"{name} has {len(column)} tensors, and params {len(params)}; there is one for each"
            )
        if len({x.dtype for x in column}) > 1:
            dtypes = ", ".join(sorted({str(x.dtype) for x in column}))
            raise ValueError(f"{name} must be of one dtype, not of {dtypes}; call adamw once for each")
    names = [name for name, column in columns.items() if column]
    for param, *others in zip(*(columns[name] for name in names), strict=True):
        shape, device, is_contiguous = param.shape, param.device, param.is_contiguous()
        for name, x in zip(names, (param, *others), strict=True):
            lie_alike = (
                x.is_contiguous() if is_contiguous else param.stride() == x.stride() and _is_dense(param)
            )
            if not lie_alike or x.shape != shape or x.device != device:
                raise ValueError(
                    f"{name} holds a tensor {tuple(x.shape)}, strides {x.stride()}, on {x.device} for a parameter "
                    f"{tuple(param.shape)}, strides {param.stride()}, on {param.device}; both must lie alike in "
                    "memory, without gaps, as torch.empty_like makes it"
                )
    if len(absmaxes[0]) != len(absmaxes[1]):
        raise ValueError("exp_avgs and exp_avg_sqs must both be tensors or both Blocks")
    for column in absmaxes:
        for param, x in zip(params, column, strict=bool(column)):
            if x.shape != (math.ceil(param.numel() / BLOCK),) or not x.is_contiguous():
                raise ValueError(
                    f"absmax {tuple(x.shape)} must be one number for each {BLOCK} elements of {tuple(param.shape)}"
                )


def _is_dense(x: Tensor) -> bool:
    """Whether x's elements fill a piece of memory in some order of its dims."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
