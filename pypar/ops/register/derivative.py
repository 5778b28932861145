"""An operator under autograd and under torch.func's transforms: its derivative, and its rule for torch.vmap.

torch.library.register_autograd would do for autograd alone: the torch.autograd.Function that it makes refuses to run
under torch.func.grad and its relatives, and forgets tangents in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from pypar.ops.calls import called

Operator = torch._ops.OpOverload

_ONCE = "has no derivative: pypar's operators differentiate once; write this in plain PyTorch for second derivatives"
_NO_FORWARD_MODE = (
    "has no derivative in forward mode, which torch.func.jvp, jacfwd and hessian ask for; use backward(), "
    "torch.func.grad, vjp or jacrev, or write this in plain PyTorch"
)


@dataclass(frozen=True)
class Derivative:
    """save(ctx, inputs, output), gradient(ctx, *douts), as in torch.library.register_autograd."""

    gradient: Callable
    save: Callable


Derivatives = dict[str, Derivative]
"""Those of the operators that have one, by name."""


def autograd_kernel(op: Operator, derivatives: Derivatives) -> Callable:
    """What the dispatcher runs for `op` where derivatives are taken; it looks op's up by its name, or refuses."""
    tensors = [i for i, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]
    name = op._opname
    family = name.removesuffix("_forward")

    def below(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
        *inputs, keyset = inputs_and_keyset
        output = called(family, inputs, lambda: below(keyset, tuple(inputs)))
        if name in derivatives:
            derivatives[name].save(ctx, tuple(inputs), output)
        return output

    def forward_of_one_level(ctx: Any, *inputs_and_keyset: Any) -> Any:
        # Function.apply turns derivatives off, but the transforms further out may take some.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return forward(ctx, *inputs_and_keyset)

    def backward(ctx: Any, *douts: Any) -> tuple[Any, ...]:
        if name not in derivatives:
            raise NotImplementedError(f"pypar::{name} {_ONCE}")
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = needed[:-1]  # the inputs'
        try:
            found = derivatives[name].gradient(ctx, *douts)
        finally:
            ctx.needs_input_grad = needed
        return (*(found if isinstance(found, tuple) else (found,)), None)

    usual: Any = type(
        name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    # The dispatcher calls the kernel once for each level of torch.func's transforms.
    methods = {"forward": staticmethod(forward_of_one_level), "backward": staticmethod(backward)}
    of_one_level: Any = type(name, (_SingleLevelFunction,), methods)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        given = _tensors_of(inputs[i] for i in tensors)
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in given
        ):
            raise NotImplementedError(f"pypar::{name} {_NO_FORWARD_MODE}")
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
            return below(keyset, inputs)
        if op._schema.is_mutable:
            raise NotImplementedError(
                f"pypar::{name} writes into a tensor and has no derivative; pass x.detach(), or use torch.no_grad()"
            )
        if not torch._C._are_functorch_transforms_active():
            return usual.apply(*inputs, keyset)
        with enable_single_level_autograd_function():
            return of_one_level.apply(*inputs, keyset)

    return kernel


def _tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, some of which are lists of tensors and some None."""
    tensors: list[Tensor] = []
    for value in values:
        tensors += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tensors


def one_by_one(op: Operator) -> Callable:
    """The rule of torch.vmap for `op`: it runs for one element of the batch after the other."""
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]
    takes_lists = any("List[Tensor]" in str(argument.type) for argument in op._schema.arguments)

    def element(x: Any, dim: Any, index: int) -> Any:
        return x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        if takes_lists:
            raise ValueError(f"torch.vmap cannot run {op}, which takes lists of tensors; call it in a loop")
        if not info.batch_size:
            raise ValueError(f"torch.vmap over a dimension of size 0 does not run {op}; leave the call out")
        if any(in_dims[i] is None and inputs[i] is not None for i in written):
            raise ValueError(
                f"torch.vmap cannot run {op}, which writes into a tensor that is not batched; batch it"
            )
        outputs = [
            op(*(element(x, dim, index) for x, dim in zip(inputs, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        if outputs[0] is None:
            return None, None
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
