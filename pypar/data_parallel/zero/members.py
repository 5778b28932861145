"""One parameter of a store: its whole memory, this rank's rows of it, their master and gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pypar.blocks import Block
from pypar.comm import shared_empty
from pypar.data_parallel.zero.cut import cut_further, piece, rows_of
from pypar.data_parallel.zero.freed import show_freed, show_here
from pypar.layout import Layout, layout_of, local_tensor
from pypar.mesh import Axis
from pypar.spans import Span

_BELOW_FP32 = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Member:
    """A parameter and what this rank keeps of it.

    whole        all of what the model computes with, by a tensor that shares its memory but not its graph
    share        this rank's rows in the model's dtype: of ``whole`` where that always stays
    master       what an optimizer updates, fp32 where the model's dtype has 16 bits; the share where dtypes agree
    gradient     this rank's rows of the gradient, in the master's dtype
    accumulated  the whole gradient as it is added up, where there is one
    """

    name: str
    parameter: nn.Parameter
    rows: list[Span]  # of each rank of the axis
    rank: int
    layout: Layout
    whole: Tensor
    share: Tensor
    master: nn.Parameter | None = None
    gradient: Tensor | None = None
    accumulated: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)  # of ``whole``, each rank's rows

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor of the whole's shape."""
        return piece(x, self.rows[self.rank])

    def each(self, x: Tensor) -> list[Tensor]:
        """The rows of each rank."""
        return [piece(x, rows) for rows in self.rows]

    @property
    def storage(self) -> torch.UntypedStorage:
        return self.whole.untyped_storage()

    @property
    def is_here(self) -> bool:
        return not self.whole.numel() or self.storage.size() > 0

    def bring(self) -> None:
        """Take memory for the whole, without values."""
        if not self.is_here:
            self.storage.resize_(self.whole.nbytes)
            show_here(self.parameter)

    def free(self) -> None:
        """Give the memory of the whole back."""
        if self.whole.numel():
            self.storage.resize_(0)
            show_freed(self.parameter)


@dataclass(eq=False)
class Group:
    """Members that travel together: one axis, one dtype, all of them trained or none."""

    members: list[Member]
    axis: Axis  # over which rows are cut
    outer: Axis  # over which the cut rows' gradients are summed as well
    inner: Axis  # over which rows stay cut between forward and backward
    is_trained: bool
    flat: Tensor | None = None  # the shares one after the other, where the axis's ranks may read them
    gradients: Tensor | None = (
        None  # of this rank's rows one after the other, where they have memory of their own
    )
    seconds: list[Tensor] = field(
        default_factory=list
    )  # rows over the inner axis, between forward and backward

    def lay_out(self) -> None:
        """Let the shares lie in memory that the axis's ranks share. Every rank of the axis calls it."""
        largest = max(
            sum(piece(m.whole, m.rows[rank]).numel() for m in self.members) for rank in range(self.axis.size)
        )
        first = self.members[0].share
        self.flat = shared_empty(largest, first.dtype, self.axis, first.device)
        begin = 0
        for member in self.members:
            end = begin + member.share.numel()
            place = self.flat[begin:end].view(member.share.shape)
            place.copy_(member.share)
            if member.master is not None and member.master.dtype == place.dtype:
                member.master.data = place
            member.share, begin = place, end
        self.flat = self.flat[:begin]

    def inner_parts(self) -> list[list[Tensor]]:
        """For each rank of the inner axis its rows of the wholes."""
        cut = [(m.whole, rows_of(m.whole, self.inner.size)) for m in self.members]
        return [[piece(whole, rows[rank]) for whole, rows in cut] for rank in range(self.inner.size)]

    def parts(self) -> list[list[Tensor]]:
        """For each rank its rows of the wholes."""
        return [[member.parts[rank] for member in self.members] for rank in range(self.axis.size)]

    def shares(self) -> list[Tensor]:
        return [member.share for member in self.members]

    def sums(self) -> list[Tensor]:
        """This rank's rows of the gradients, of a group that is trained."""
        return [member.gradient for member in self.members if member.gradient is not None]


@dataclass(eq=False)
class Unit:
    """The parameters of a block, or of the root: they come, go and are reduced together."""

    block: Block
    groups: list[Group]
    is_whole: bool = True
    has_second: bool = False  # it is cut over the inner axes now
    is_reduced: bool = False  # in this step
    visits: int = 0  # forwards whose backward has not come yet
    holds: int = 0  # reasons to stay whole
    root: Unit | None = None  # of whose parameters it uses some

    @property
    def members(self) -> Iterable[Member]:
        return (member for group in self.groups for member in group.members)

    @property
    def trained(self) -> list[Group]:
        return [group for group in self.groups if group.is_trained]


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an optimizer keeps of a parameter that the model computes with in this dtype."""
    return torch.float32 if dtype in _BELOW_FP32 else dtype


@torch.no_grad()
def make_member(
    name: str, parameter: nn.Parameter, axis: Axis, dtype: torch.dtype | None, *, cuts_parameters: bool
) -> Member:
    """A parameter's member, and the parameter with memory of its own, in ``dtype`` where it is a floating-point one.

    cuts_parameters: this rank keeps its rows in memory of their own, so that the whole may be freed.
    """
    value = local_tensor(parameter).detach()
    computes_in = dtype if dtype is not None and value.is_floating_point() else value.dtype
    whole = value.to(computes_in).contiguous()
    is_its_own = whole.untyped_storage().nbytes() == whole.nbytes and not cuts_parameters
    if whole is value and not is_its_own:
        whole = whole.clone()
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = whole
        parameter.grad = None
    whole = local_tensor(parameter).detach().data
    rows = rows_of(whole, axis.size)
    member = Member(name, parameter, rows, axis.rank, cut_further(layout_of(parameter), axis), whole, whole)
    member.parts = member.each(whole)
    member.share = member.parts[axis.rank].clone() if cuts_parameters else member.parts[axis.rank]
    if parameter.requires_grad:
        kept = master_dtype(computes_in if dtype is None else value.dtype)
        master = member.share if kept == computes_in else member.own(value).to(kept, copy=True).contiguous()
        member.master = nn.Parameter(master.data)
    return member
