"""The store `zero`: optimizer states, gradients and parameters cut over the data ranks (arXiv 1910.02054)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pypar.blocks import Block
from pypar.data_parallel.stores.around_blocks import around_blocks
from pypar.data_parallel.stores.places import places_for
from pypar.data_parallel.zero import states
from pypar.data_parallel.zero.account import Account
from pypar.data_parallel.zero.arguments import check_mesh, check_model, check_offload, check_options
from pypar.data_parallel.zero.build import Build, make_units, owned_by
from pypar.data_parallel.zero.cast import cast_inputs
from pypar.data_parallel.zero.clip import clip
from pypar.data_parallel.zero.gathering import Gathering, Kept, publish_whole
from pypar.data_parallel.zero.members import Unit
from pypar.data_parallel.zero.order import Order
from pypar.data_parallel.zero.reducing import Reducing
from pypar.grid import SAMPLES
from pypar.layout import Layout
from pypar.mesh import Axis, Mesh
from pypar.ops.uncompiled import uncompiled_class
from pypar.owned import Owned


@uncompiled_class("it is communication between ranks")
class Zero:
    """Who holds what of a model that is trained on several data ranks; `pypar.zero` makes it, and says how.

    It is a `pypar.data_parallel.store.Store`, and what a script needs besides.
    """

    def __init__(  # noqa: PLR0913 - one argument an option
        self,
        models: Sequence[nn.Module],
        mesh: Mesh,
        *,
        stage: int = 3,
        shard_size: int = 0,
        reshard: bool | int = True,
        dtype: torch.dtype | None = None,
        average: bool = True,
        accumulate: str = "local",
        blocks: Sequence[Block | str] | None = None,
        bucket_bytes: int = 25 << 20,
        ends_with_backward: bool = True,
        offload: str = "none",
        device_bytes: int | None = None,
    ) -> None:
        check_mesh(mesh)
        for model in models:
            check_model(model)
        check_options(
            stage=stage,
            shard_size=shard_size,
            reshard=reshard,
            dtype=dtype,
            accumulate=accumulate,
            bucket_bytes=bucket_bytes,
            num_samples=mesh.axis(SAMPLES).size,
        )
        check_offload(offload, device_bytes)
        shard = shard_size or mesh.axis(SAMPLES).size
        self.stage = stage
        self.reshard = reshard if type(reshard) is bool or 1 < reshard < shard else reshard > 1
        self._reduces_each = accumulate == "reduce"
        self._ends_with_backward = ends_with_backward
        self.places = places_for(offload, device_bytes, models)
        build = Build(stage, shard_size, self.reshard, dtype, bucket_bytes, self.places.keeps_rows)
        made = make_units(models, mesh, build, blocks)
        self.mesh, self._models, self._units, self._roots = made.mesh, list(models), made.units, made.roots
        self._of_block = {unit.block: unit for unit in self._units}
        self._account = Account(self.places.count)
        held = (self._units, self._account, self.places)
        self._gathering: Gathering | Kept = Gathering(*held) if stage == 3 else Kept()
        factor, keeps_whole = (
            1.0 / mesh.data.size if average else 1.0,
            stage < 2 and not self.places.keeps_rows,
        )
        self._reducing = Reducing(*held, keeps_whole=keeps_whole, factor=factor)
        self.places.begin(self._units, most_bytes=bucket_bytes, is_cut=stage == 3)
        self._account.begin(self._units, cuts_parameters=stage == 3)
        self._owned = owned_by(made)
        self._accumulating = False
        self._orders = {backward: Order() for backward in (False, True)}
        for model, root, own in zip(models, self._roots, made.blocks, strict=True):
            around_blocks(model, self, own, root.name)
            if dtype is not None:
                cast_inputs(model, dtype)

    # ---- what a script calls

    def parameters(self) -> list[nn.Parameter]:
        """This rank's rows of every parameter that is trained, for an optimizer: fp32 where the model's has 16 bits.

        Every rank has all of them, in one order; of some it may have no rows. Their ``grad`` is final when the step's
        last backward has returned.
        """
        return [owned.master for owned in self._owned]  # type: ignore[misc]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """`parameters` with the names that they have in the model."""
        return [(owned.name, owned.master) for owned in self._owned]  # type: ignore[misc]

    def zero_grad(self) -> None:
        """Set all gradients to zero: before each step's first backward."""
        self.zero()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm over all ranks is at most ``max_norm``; returns the norm before.

        Every rank of the mesh calls it, and gets the same fp32 scalar; each element of the model counts once. The
        factor is max_norm / (norm + 1e-6), as torch's is. Gradients whose norm is not finite stay as they are: skip the
        step then.
        """
        return clip(self._owned, max_norm, self.mesh)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all parameters are whole; what is written into them, alike on every rank, is taken over at the end.

        Every rank enters it. Forward and backward may run inside.
        """
        with self.places.aside():
            for unit in self._units:
                self._gathering.wait(unit)
                unit.holds += 1
        try:
            yield
            states.take_over(self._units)
            self.places.changed()
        finally:
            for unit in self._units:
                unit.holds -= 1
                self._gathering.free(unit)

    def state_dict(self, *, whole: bool = True) -> dict[str, Tensor]:
        """Every parameter by its name, in the precision in which it is kept. Every rank of the mesh calls it.

        whole  True: all of each and the buffers, as state_dict() of the model of one process. False: this rank's rows,
               which torch.distributed.checkpoint writes, and reads into (then `load_state_dict`)

        What comes back is a copy.
        """
        return (
            states.whole(self._models, self._units)
            if whole
            else states.parts(self._models, self._units, self.mesh)
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, of either kind. ValueError where names or shapes are others."""
        self.places.changed()
        states.load(self._models, self._units, state, self.mesh)
        with self.places.aside():
            self.publish()

    def memory(self) -> dict[str, int]:
        """Bytes on this rank now, but for optimizer states; `pypar.data_parallel.zero.account.Account` says of what."""
        return dict(self._account.now)

    def peak_memory(self) -> dict[str, int]:
        """The most that each of `memory` has been since `reset_peak_memory`, or since the store was made."""
        return dict(self._account.peak)

    def reset_peak_memory(self) -> None:
        """Begin to look for peaks anew."""
        self._account.reset_peak()

    def holds_states_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the states of an optimizer of `parameters` lie where their parameters do; else they stay on the host."""
        self.places.optimizer = optimizer

    def close(self) -> None:
        """Let no more gradients be reduced by this store, which is not used any more."""
        self._reducing.close()

    # ---- what a store does

    @property
    def axes(self) -> list[Axis]:
        """The axes over which it communicates."""
        groups = [group for unit in self._units for group in unit.groups]
        axes = dict.fromkeys(axis for group in groups for axis in (group.axis, group.outer, group.inner))
        return [axis for axis in axes if axis.size > 1]

    def owned(self) -> list[Owned]:
        """This rank's rows of every parameter that is trained."""
        return self._owned

    def frozen(self) -> dict[str, tuple[Tensor, Layout]]:
        """This rank's rows of every parameter that is not trained; at stages below 3 all of them."""
        members = [member for unit in self._units for member in unit.members if member.master is None]
        return {member.name: (member.share, member.layout) for member in members}

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward in here is not the step's last one."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def reduce(self) -> None:
        """Wait until the gradients of what this rank owns are final."""
        if not self._reducing.is_final:
            self._reducing.finish()
            for unit in self._units:
                unit.visits = 0

    @torch.no_grad()
    def publish(self) -> None:
        """Let parameters be what the masters are, rounded to the parameters' dtypes."""
        for unit in self._units:
            for group in unit.trained:
                for member in group.members:
                    if member.master is not None and member.master.dtype != member.share.dtype:
                        member.share.copy_(member.master)
        if self.stage == 3:
            self._gathering.refresh()
        else:
            publish_whole(self._units, self.places)
        self.places.end_step()

    def zero(self) -> None:
        """Set all gradients to zero."""
        self._reducing.zero()

    # ---- around blocks

    def enter(self, block: Block, *, backward: bool = False) -> None:
        """Gather a block's parameters, and start to gather those of the next one."""
        unit, order = self._of_block.get(block), self._orders[backward]
        if block in self._roots:
            order.begin()
            if backward:
                self._reducing.begin()
        if unit is None:
            return
        if unit.root is not None:
            self._gathering.wait(unit.root)
        self._gathering.wait(unit)
        following = None if block in self._roots else order.after(unit)
        if following is not None:
            self._gathering.start(following)

    def leave(self, block: Block, *, backward: bool = False, returns: bool = False) -> None:
        """Free a block's parameters, or keep them for its backward; after that, start to reduce its gradients."""
        is_root, unit = block in self._roots, self._of_block.get(block)
        if is_root:
            self._leave_root(block, backward, returns)
        elif unit is not None:
            unit.visits = max(0, unit.visits - 1) if backward else unit.visits + returns
            comes_back = unit.visits > 0 if backward else returns
            if backward and not comes_back:
                self._start_reduction(unit)
            if not comes_back or self.reshard is not False:
                self._gathering.free(unit, keeps_second=comes_back and self.reshard is not True)

    def _leave_root(self, root: Block, backward: bool, returns: bool) -> None:
        self._orders[backward].end()
        self._free_idle(self._of_block[root] if returns else None)
        if not backward:
            return
        if self._accumulating:
            if self._reduces_each:
                for unit in reversed(self._units):
                    if unit.trained and not unit.is_reduced:
                        self._reducing.start(unit, is_last=False)
                for unit in self._units:
                    unit.is_reduced = False
        elif self._ends_with_backward:
            self.reduce()

    def _free_idle(self, kept: Unit | None = None) -> None:
        """Free what no backward comes back to soon."""
        self._gathering.settle()
        for unit in self._units:
            if unit is not kept and not (unit.visits and self.reshard is False):
                self._gathering.free(unit, keeps_second=unit.visits > 0 and self.reshard is not True)

    def _start_reduction(self, unit: Unit) -> None:
        if unit.trained and (self._reduces_each or not self._accumulating):
            self._reducing.start(unit)

    def abandon(self) -> None:
        """A backward has failed."""
        self._gathering.free_all()
        self._reducing.abandon()
        self.places.restart()
        for unit in self._units:
            unit.visits, unit.is_reduced = 0, False
