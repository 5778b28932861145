"""The order in which backward finishes gradients, as the first rank saw it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pypar.data_parallel.flat import Slot
from pypar.mesh import Axis


def agree_on_order(slots: Sequence[Slot], seen: Sequence[Slot], axis: Axis) -> list[Slot]:
    """The slots in the order that the axis's first rank has `seen`; those that it has not seen follow as they stood.

    One broadcast; every rank of the axis calls this with the same slots in the same order.
    """
    number = {slot: i for i, slot in enumerate(slots)}
    order = list(dict.fromkeys([*seen, *slots]))
    numbers = torch.tensor(
        [number[slot] for slot in order], dtype=torch.int64, device=slots[0].gradient.device
    )
    axis.traffic.record("broadcast", numbers.nbytes if axis.rank == 0 else 0)
    dist.broadcast(numbers, axis.ranks[0], group=axis.group)
    return [slots[i] for i in numbers.tolist()]
