"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass over what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pypar.layout import local_tensor
from pypar.ops import adamw as operator
from pypar.ops.uncompiled import uncompiled
from pypar.optimizers.config import OptimizerConfig
from pypar.optimizers.rule import UpdateRule

MOMENTS = ("exp_avg", "exp_avg_sq")
LEAST_IN_8_BITS = 4096  # elements; fewer stay in fp32, as in bitsandbytes: they cost nothing
# A group's options that are not torch's
_STORAGE = ("master_weights", "moments", "stochastic_rounding", "seed")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same arguments, whose update is pypar.ops.adamw.

    A group may also say how it keeps its numbers:

    master_weights       True: weights in fp32 beside parameters of 16 bits, which become their rounded copies
    moments              torch.float32, torch.bfloat16, or torch.uint8 for 8 bits in blocks of 256 (parameters below
                         4096 elements keep fp32; give embeddings a group with torch.float32). None: the master's
                         dtype, or the parameter's, as torch has it
    stochastic_rounding  True: a bf16 parameter without a master, and a second moment in bf16, are rounded up or down by
                         random numbers of `seed`, the step and the element's place, so that small updates are not lost

    `foreach` and `fused` choose between torch's programs for the same update, and change nothing here. The state has
    torch's names, and `master`; moments in 8 bits are `exp_avg_codes` and `exp_avg_absmax`, and so for `exp_avg_sq`.
    load_state_dict takes a state of torch's or of any of these options, and converts it to what this optimizer keeps.
    torch.amp.GradScaler leaves the division by its scale to the update. ValueError: amsgrad, capturable and
    differentiable, which it has no code for.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        moments: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        storage = (master_weights, moments, stochastic_rounding, seed)
        self._storage = dict(zip(_STORAGE, storage, strict=True))
        super().__init__(
            params,
            lr,
            betas,  # type: ignore[arg-type]
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._storage)
        self._step_supports_amp_scaling = True  # read by torch.amp.GradScaler

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**self._storage, **param_group})
        _check(self.param_groups[-1])

    @uncompiled("it writes into parameters and makes their state at the first step")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and bool(
            found_inf
        ):  # as GradScaler looks for any optimizer that it unscales for
            return loss
        scale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float()
        first = 0
        for group in self.param_groups:
            used: list[tuple[Tensor, dict[str, Any], int]] = []
            for param in group["params"]:
                if param.grad is not None:
                    used.append((param, self._state_of(param, group), first))
                first += param.numel()
            counts = [state["step"] for _, state, _ in used]
            if counts:
                torch._foreach_add_(counts, 1)
            calls: dict[Any, list[_Entry]] = {}
            for (param, state, place), count in zip(used, counts, strict=True):
                entry = _entry(param, state, group, place, int(count.item()))
                calls.setdefault(entry.alike(), []).append(entry)
            for entries in calls.values():
                _update(entries, group, scale)
        return loss

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter that has a gradient, made at its first step."""
        if param.is_complex() or param.grad.is_sparse:  # type: ignore[union-attr]
            raise ValueError(
                f"a parameter {tuple(param.shape)} is complex or has a sparse gradient, which AdamW does not "
                "update; use torch.optim.SparseAdam, or torch.view_as_real"
            )
        state: dict[str, Any] = self.state[param]
        if not state:
            state.update(_new_state(param, group))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """torch's, but what is loaded keeps its dtype on the way, and how this optimizer keeps its numbers stays."""
        states = {
            key: {
                name: _Kept(x) if isinstance(x, Tensor) and name != "step" else x for name, x in state.items()
            }
            for key, state in state_dict["state"].items()
        }
        own = [{name: group[name] for name in _STORAGE} for group in self.param_groups]
        saved = state_dict["param_groups"]
        groups = [{**group, **mine} for group, mine in zip(saved, own, strict=False)] + saved[len(own) :]
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        self._storage = {name: self.defaults[name] for name in _STORAGE}
        for group in self.param_groups:
            _check(group)
            for param in group["params"]:
                if any(isinstance(x, _Kept) for x in self.state.get(param, {}).values()):
                    self.state[param] = _taken(param, group, self.state[param])


class _Kept:
    """A tensor of a state that is being loaded, which torch would convert to the parameter's dtype if it saw it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Entry(NamedTuple):
    """What one parameter's update takes."""

    param: Tensor
    gradient: Tensor
    exp_avg: Tensor | operator.Blocks
    exp_avg_sq: Tensor | operator.Blocks
    master: Tensor | None
    place: operator.Place
    step: int

    def alike(self) -> Any:
        """Entries with the same go through one call."""
        kinds = [x.dtype if isinstance(x, Tensor) else "blocks" for x in (self.exp_avg, self.exp_avg_sq)]
        return self.param.dtype, self.gradient.dtype, self.param.device, *kinds, self.step


def _entry(param: Tensor, state: dict[str, Any], group: dict[str, Any], first: int, step: int) -> _Entry:
    """first: how many elements the parameters before this one have. step: which update of it this is."""
    plain, gradient = _local(param), _local(param.grad)  # type: ignore[arg-type]
    if gradient.stride() != plain.stride():
        gradient = torch.empty_like(plain, dtype=gradient.dtype).copy_(gradient)
    moments = [
        _local(state[name])
        if name in state
        else operator.Blocks(state[f"{name}_codes"], state[f"{name}_absmax"])
        for name in MOMENTS
    ]
    master = _local(state["master"]) if group["master_weights"] else None
    place = operator.Place(first, plain.numel() or 1, 0)
    return _Entry(plain, gradient, moments[0], moments[1], master, place, step)


def _local(x: Tensor) -> Tensor:
    """What this rank holds, as a plain tensor that shares memory with x."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return x
    return x.to_local() if isinstance(x, DTensor) else local_tensor(x)


def _update(entries: list[_Entry], group: dict[str, Any], scale: float | Tensor) -> None:
    params, gradients, exp_avgs, exp_avg_sqs, masters, places, steps = zip(*entries, strict=True)
    beta1, beta2 = group["betas"]
    update = operator.Update(
        step=steps[0],
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        seed=group["seed"] if group["stochastic_rounding"] else None,
    )
    operator.adamw(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        update,
        masters=masters if group["master_weights"] else None,
        scale=scale,
        places=places,
    )


def _check(group: dict[str, Any]) -> None:
    """ValueError for what a group asks for and this optimizer lacks."""
    for name in ("amsgrad", "capturable", "differentiable"):
        if group[name]:
            raise ValueError(
                f"pypar.AdamW has no {name}; leave it out, or use torch.optim.AdamW({name}=True)"
            )
    if group["moments"] not in (None, torch.float32, torch.bfloat16, torch.uint8):
        raise ValueError(
            f"moments={group['moments']} must be torch.float32, torch.bfloat16, torch.uint8 (8 bits in blocks), or "
            "None for the parameter's dtype"
        )
    for param in group["params"]:
        if param.numel() != local_tensor(param).numel() or isinstance(param, DTensor):
            if group["moments"] == torch.uint8:
                raise ValueError(
                    f"a parameter {tuple(param.shape)} is cut over ranks, and blocks of 256 elements would be others "
                    "on each number of ranks; use moments=torch.bfloat16"
                )
            if group["stochastic_rounding"]:
                raise ValueError(
                    f"a parameter {tuple(param.shape)} is cut over ranks, and AdamW does not know the places of its "
                    "elements; use master_weights=True, or pypar.ops.adamw with `places`"
                )


def _moments_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    if group["moments"] == torch.uint8 and param.numel() < LEAST_IN_8_BITS:
        return torch.float32
    return group["moments"] or (torch.float32 if group["master_weights"] else param.dtype)


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"step": torch.tensor(0.0)}
    dtype = _moments_dtype(param, group)
    for name in MOMENTS:
        if dtype == torch.uint8:
            zeros = operator.zero_blocks(param, signed=name == "exp_avg")
            state[f"{name}_codes"], state[f"{name}_absmax"] = zeros
        else:
            state[name] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    if group["master_weights"]:
        state["master"] = param.detach().clone().to(torch.float32)
    return state


def _taken(param: Tensor, group: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """A state that was loaded, as this group keeps it."""
    found = {name: x.value if isinstance(x, _Kept) else x for name, x in loaded.items()}
    state: dict[str, Any] = {"step": found["step"].detach().float().cpu()}
    dtype = _moments_dtype(param, group)
    for name in MOMENTS:
        signed, codes, absmax = name == "exp_avg", f"{name}_codes", f"{name}_absmax"
        if dtype == torch.uint8 and codes in found:
            state[codes], state[absmax] = found[codes].to(param.device), found[absmax].to(param.device)
        elif dtype == torch.uint8:
            lying = torch.empty_like(param, dtype=torch.float32).copy_(found[name])
            state[codes], state[absmax] = operator.to_blocks(lying, signed=signed)
        elif codes in found:
            blocks = operator.Blocks(found[codes], found[absmax])
            state[name] = operator.from_blocks(blocks, signed=signed).to(param.device, dtype)
        else:
            state[name] = found[name].to(param.device, dtype)
    if group["master_weights"]:
        master = found.get("master")
        state["master"] = (param.detach().clone() if master is None else master).to(
            param.device, torch.float32
        )
    return state


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """One pass over master, gradient and both moments."""
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


RULE = UpdateRule(adamw, moments=MOMENTS)
