"""An optimizer over what a rank owns: the update, clipping, and the global gradient norm."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pypar.layout import Layout, answers_for
from pypar.mesh import Mesh
from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.on_disk import OnDisk
from pypar.optimizers.registry import rule_named
from pypar.owned import Owned

Groups: TypeAlias = list[dict[str, Any]]
MakeOptimizer: TypeAlias = Callable[[Groups], torch.optim.Optimizer]


class Optimizer:
    """The optimizer that ``config`` names, over fp32 masters and their gradients. Matrices decay, vectors do not.

    on_disk   puts its states on a disk: takes what makes an optimizer of some groups, and the groups, and returns the
              optimizer; None: they stay in memory
    """

    def __init__(
        self,
        owned: Iterable[Owned],
        config: OptimizerConfig,
        *,
        on_disk: Callable[[MakeOptimizer, Groups], OnDisk] | None = None,
    ) -> None:
        self.config, self.owned = config, list(owned)
        for each in self.owned:
            each.master.grad = each.gradient
        matrices = [each.master for each in self.owned if len(each.layout.global_shape) > 1]
        vectors = [each.master for each in self.owned if len(each.layout.global_shape) <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        rule = rule_named(config.name)
        self.moments = rule.moments
        groups = [group for group in groups if group["params"]]

        def make(groups: Groups) -> torch.optim.Optimizer:
            return rule.make(groups, config)

        self.update = make(groups) if on_disk is None else on_disk(make, groups)
        if isinstance(self.update, OnDisk):
            self.update.start(self._first_states)
        else:  # not at the first step, so that a checkpoint loads in place
            for each in self.owned:
                self.update.state[each.master] = self._first_states(each.master)

    def _first_states(self, master: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(master, requires_grad=False)
        return {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            **{moment: zeros.clone() for moment in self.moments},
        }

    def square_sum(self, mesh: Mesh) -> Tensor:
        """Sum of squares (fp64) of the gradients that this rank answers for: over all ranks, each element once."""
        total = torch.zeros((), dtype=torch.float64)
        for each in self.owned:
            if answers_for(each.layout, mesh.grid, mesh.rank):
                norm = torch.linalg.vector_norm(each.gradient, dtype=torch.float64)
                total += norm.square().to(total.device)
        return total

    def num_not_finite(self, mesh: Mesh) -> int:
        """How many of the gradients that this rank holds and others answer for are not finite; square_sum has its own.

        A gradient that several ranks hold alike may still be infinite on one of them alone.
        """
        rest = [each for each in self.owned if not answers_for(each.layout, mesh.grid, mesh.rank)]
        norms = [torch.linalg.vector_norm(each.gradient, dtype=torch.float64) for each in rest]
        return int((~torch.isfinite(torch.stack(norms))).sum()) if norms else 0

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float, loss_scale: float = 1.0) -> None:
        """Clip to ``clip_norm`` (0 = never) and update the masters; the store publishes them.

        The gradients are loss_scale times what gradient_norm is the norm of.
        """
        for group in self.update.param_groups:
            group["lr"] = lr
        is_clipped = self.config.clip_norm and gradient_norm > self.config.clip_norm
        divisor = loss_scale * gradient_norm / self.config.clip_norm if is_clipped else loss_scale
        if divisor != 1 and getattr(self.update, "_step_supports_amp_scaling", False):
            # Such an optimizer divides by grad_scale in the pass that reads the gradients anyway.
            self.update.__dict__["grad_scale"] = torch.tensor(divisor)
            self.update.step()
            del self.update.__dict__["grad_scale"]
            return
        if divisor != 1:
            torch._foreach_mul_([each.gradient for each in self.owned], 1 / divisor)
        self.update.step()

    def state(self) -> dict[str, tuple[Tensor, Layout]]:
        """Name -> (tensor, layout) of all that a resumed run needs: master weights and their moments.

        They are to be used before the next update.
        """
        if isinstance(self.update, OnDisk):
            self.update.bring_back()
        tensors: dict[str, tuple[Tensor, Layout]] = {}
        for each in self.owned:
            tensors[f"model.{each.name}"] = (each.master.detach(), each.layout)
            for moment in self.moments:
                tensors[f"optimizer.{moment}.{each.name}"] = (
                    self.update.state[each.master][moment],
                    each.layout,
                )
        return tensors

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """To be called once the tensors of ``state()`` were overwritten: ``step`` updates have been made."""
        for each in self.owned:
            self.update.state[each.master]["step"].fill_(step)
