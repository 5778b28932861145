"""An optimizer over fp32 master weights: the update, clipping, and the global gradient norm."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pypar.layout import Layout, answers_for, layout_of, local_tensor
from pypar.mesh import Mesh
from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.registry import rule_named


class Optimizer:
    """The optimizer that ``config`` names, over this rank's parameters; one below fp32 has an fp32 master weight.

    gradient(parameter) gives the tensor in which the parameter's gradient is at every `step`: always the same one, of
    fp32, whatever the parameter's dtype. Matrices decay, vectors do not.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        gradient: Callable[[nn.Parameter], Tensor],
        config: OptimizerConfig,
    ) -> None:
        self.config = config
        self.parameters = dict(named_parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            part = local_tensor(parameter).detach()
            master = part if part.dtype == torch.float32 else part.float()
            master.grad = local_tensor(gradient(parameter))
            self.masters[name] = master
        matrices = [m for m in self.masters.values() if m.dim() > 1]
        vectors = [m for m in self.masters.values() if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        rule = rule_named(config.name)
        self.moments = rule.moments
        self.update = rule.make([group for group in groups if group["params"]], config)
        for master in self.masters.values():  # not at the first step, so that a checkpoint loads in place
            zeros = torch.zeros_like(master, requires_grad=False)
            self.update.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: zeros.clone() for moment in self.moments},
            }

    def square_sum(self, mesh: Mesh) -> Tensor:
        """Sum of squares (fp64) of the gradients that this rank answers for: over all ranks, each element once."""
        total = torch.zeros((), dtype=torch.float64)
        for name, master in self.masters.items():
            if answers_for(layout_of(self.parameters[name]), mesh.grid, mesh.rank):
                norm = torch.linalg.vector_norm(master.grad, dtype=torch.float64)
                total += norm.square().to(total.device)
        return total

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip to ``clip_norm`` (0 = never), update the masters, round them into the parameters."""
        if self.config.clip_norm and gradient_norm > self.config.clip_norm:
            torch._foreach_mul_(self._gradients(), self.config.clip_norm / gradient_norm)
        for group in self.update.param_groups:
            group["lr"] = lr
        self.update.step()
        self._round()

    def state(self) -> dict[str, tuple[Tensor, Layout]]:
        """Name -> (tensor, layout) of all that a resumed run needs: master weights and their moments."""
        tensors: dict[str, tuple[Tensor, Layout]] = {}
        for name, master in self.masters.items():
            layout, held = layout_of(self.parameters[name]), self.update.state[master]
            tensors[f"model.{name}"] = (master.detach(), layout)
            for moment in self.moments:
                tensors[f"optimizer.{moment}.{name}"] = (held[moment], layout)
        return tensors

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """To be called once the tensors of ``state()`` were overwritten: ``step`` updates have been made."""
        for master in self.masters.values():
            self.update.state[master]["step"].fill_(step)
        self._round()

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                local_tensor(parameter).copy_(self.masters[name])
