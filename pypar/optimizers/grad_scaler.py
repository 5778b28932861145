"""torch.amp.GradScaler for a model that is spread over ranks: all of them skip a step, or none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm import all_reduce_start
from pypar.layout import local_tensor
from pypar.mesh import Axis, as_axis
from pypar.ops.uncompiled import uncompiled_class


@uncompiled_class("it keeps the scale between steps")
class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with the same arguments, whose verdict is that of all ranks of ``group``.

        scaler = pypar.GradScaler(mesh.world, "cuda")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)                  # where gradients are clipped, which are then unscaled
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer); scaler.update()

    An infinite gradient on one rank alone, as of a stage of a pipeline or of a rank's part of a weight, makes every
    rank skip the update; torch's own scaler would let the others go on, with another scale. Every rank of the group
    calls `unscale_`, or `step` without it, once an update. `pypar.AdamW` divides by the scale in its update.

    group       an axis, as mesh.world is, or a process group; None: this rank alone, as torch's
    device      kind of the gradients' device
    hysteresis  overflows that are forgiven: at the last of so many, and at each one after it, the scale shrinks; when
                it grows, they are forgiven anew (Megatron-LM has 2)
    """

    def __init__(
        self,
        group: Axis | dist.ProcessGroup | None = None,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        hysteresis: int = 1,
    ) -> None:
        if hysteresis < 1:
            raise ValueError(f"hysteresis ({hysteresis}) must be at least 1: shrink at every overflow")
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._axis = Axis.single("none") if group is None else as_axis(group)
        self._hysteresis, self._spare = hysteresis, hysteresis
        self._spare_tensor: Tensor | None = None

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        """Torch's, over this rank's parts of gradients, and then the worst of all ranks."""
        gradients = [
            local_tensor(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]  # fmt: skip
        found = found_inf.clone()
        by_kind: dict[Any, list[Tensor]] = {}
        for gradient in gradients:
            if not allow_fp16 and gradient.dtype == torch.float16:
                raise ValueError(
                    "gradients are fp16, and unscaled ones would be lost in it; keep the weights that the optimizer "
                    "updates in fp32"
                )
            gradient = gradient.coalesce()._values() if gradient.is_sparse else gradient
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        with torch.no_grad():
            for (device, _), alike in by_kind.items():
                there = found_inf.to(device, copy=True)
                torch._amp_foreach_non_finite_check_and_unscale_(alike, there, inv_scale.to(device))
                found = torch.maximum(found, there.to(found.device))
            if self._axis.size > 1:
                found = all_reduce_start(found, self._axis, dist.ReduceOp.MAX).wait()
        return {found.device: found}

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """torch's, with hysteresis."""
        if not self._enabled or new_scale is not None or self._hysteresis == 1:
            super().update(new_scale)
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        states = self._per_optimizer_states.values()
        found = [x.to(scale.device) for state in states for x in state["found_inf_per_device"].values()]
        if not found:
            raise RuntimeError("update() was called before step(optimizer), which tells what was found")
        overflowed = torch.stack(found).amax() > 0
        if self._spare_tensor is None:
            self._spare_tensor = torch.full_like(tracker, self._spare)
        # Tensors, so that nobody waits for a GPU.
        spare = (self._spare_tensor - overflowed.to(tracker.dtype)).clamp(min=0)
        good_steps = torch.where(overflowed, 0, tracker + 1)
        grows, shrinks = good_steps == self._growth_interval, overflowed & (spare == 0)
        self._spare_tensor = torch.where(grows, self._hysteresis, spare).to(tracker.dtype)
        tracker.copy_(torch.where(grows, 0, good_steps))
        factor = torch.where(grows, self._growth_factor, torch.where(shrinks, self._backoff_factor, 1.0))
        scale.mul_(factor.to(scale.dtype))
        self._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the overflows that are still forgiven."""
        state = super().state_dict()
        if not state:
            return state
        return {**state, "spare": self._spare if self._spare_tensor is None else int(self._spare_tensor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's too."""
        super().load_state_dict(state_dict)
        self._spare = min(int(state_dict.get("spare", self._hysteresis)), self._hysteresis)
        self._spare_tensor = None
