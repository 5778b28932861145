"""AdamW on fp32 master weights, its learning-rate schedule and the global gradient norm."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pypar.data_parallel.gradients import Gradients
from pypar.layout import Layout, answers_for, layout_of, local_tensor
from pypar.mesh import Mesh
from pypar.train.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine to ``min_lr_ratio`` x lr at ``num_steps``; ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class Optimizer:
    """AdamW (arXiv 1711.05101) over this rank's parameters; a parameter below fp32 has an fp32 master weight.

    Gradients are read from ``gradients`` (fp32 there, whatever the parameter's dtype). Matrices decay, vectors not.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        gradients: Gradients,
        config: OptimizerConfig,
    ) -> None:
        self.config, self.gradients = config, gradients
        self.parameters = dict(named_parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            part = local_tensor(parameter).detach()
            master = part if part.dtype == torch.float32 else part.float()
            master.grad = local_tensor(gradients.gradient(parameter))
            self.masters[name] = master
        groups = [
            {
                "params": [m for m in self.masters.values() if m.dim() > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [m for m in self.masters.values() if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for (
            master
        ) in self.masters.values():  # made now, not at the first step, so that a checkpoint loads in place
            zeros = torch.zeros_like(master, requires_grad=False)
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
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
            self.gradients.scale(self.config.clip_norm / gradient_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                local_tensor(parameter).copy_(self.masters[name])

    def state(self) -> dict[str, tuple[Tensor, Layout]]:
        """Name -> (tensor, layout) of all that a resumed run needs: master weights and both moments."""
        tensors: dict[str, tuple[Tensor, Layout]] = {}
        for name, master in self.masters.items():
            layout, moments = layout_of(self.parameters[name]), self.adamw.state[master]
            tensors[f"model.{name}"] = (master.detach(), layout)
            tensors[f"optimizer.exp_avg.{name}"] = (moments["exp_avg"], layout)
            tensors[f"optimizer.exp_avg_sq.{name}"] = (moments["exp_avg_sq"], layout)
        return tensors

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """To be called once the tensors of ``state()`` were overwritten: ``step`` updates have been made."""
        for name, parameter in self.parameters.items():
            self.adamw.state[self.masters[name]]["step"].fill_(step)
            if parameter.dtype != torch.float32:
                local_tensor(parameter).copy_(self.masters[name])
