"""What torch.distributed.checkpoint asks of a tensor of which a rank holds some boxes: to write, and to read.

Source: torch.distributed._checkpointable. A tensor has as many boxes as its layout gives this rank, none included, and
boxes that several ranks hold alike are written by one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.layout import Box, GridRank, Layout, boxes, local_shape


def held_boxes(layout: Layout, holder: GridRank) -> tuple[Box, ...]:
    """The boxes of a rank; of a tensor without elements one empty box, so that its name is known."""
    if 0 not in layout.global_shape:
        return boxes(layout, holder.grid, holder.rank)
    zeros = (0,) * len(layout.global_shape)
    return (Box(zeros, layout.global_shape, zeros),)


def write_items(fqn: str, part: Tensor, layout: Layout, holder: GridRank) -> list[Any]:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties = TensorProperties.create_from_tensor(part)
    size = torch.Size(layout.global_shape)
    return [
        WriteItem(
            MetadataIndex(fqn, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, size),
        )
        for chunk in chunk_list(layout, holder)
    ]


def chunk_list(layout: Layout, holder: GridRank) -> list[Any]:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return [
        ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths))
        for box in held_boxes(layout, holder)
    ]


def tensor_at(part: Tensor, layout: Layout, holder: GridRank, offsets: torch.Size | None) -> Tensor:
    """The box of this rank's part that lies at ``offsets`` of the whole tensor, sharing memory."""
    for box in held_boxes(layout, holder):
        if offsets is None or tuple(offsets) == box.offsets:
            return part[box.local_slices]
    raise ValueError(f"this rank holds nothing at {tuple(offsets or ())} of a {layout}")


class Stored(Tensor):
    """This rank's part of a tensor of any layout on a mesh, as torch.distributed.checkpoint sees it.

    ValueError for a part of another shape than the layout gives this rank.
    """

    _layout: Layout
    _holder: GridRank
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(part: Tensor, layout: Layout, holder: GridRank) -> Stored:
        expected = local_shape(layout, holder)
        if tuple(part.shape) != expected:
            raise ValueError(
                f"this rank's part of a {layout} has shape {expected}, but the tensor has {tuple(part.shape)}; pass "
                "the part that `local_part` gives"
            )
        made: Stored = Tensor._make_subclass(Stored, part.detach())  # type: ignore[assignment]
        made._layout, made._holder = layout, holder
        return made

    def size(self, dim: int | None = None) -> Any:
        """The whole tensor's, which a checkpoint's is compared with."""
        size = torch.Size(self._layout.global_shape)
        return size if dim is None else size[dim]

    def _part(self) -> Tensor:
        return self.as_subclass(Tensor)

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return write_items(fqn, self._part(), self._layout, self._holder)

    def __create_chunk_list__(self) -> list[Any]:
        return chunk_list(self._layout, self._holder)

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return tensor_at(self._part(), self._layout, self._holder, index.offset)
