"""Plain PyTorch with its sums taken in an order that is given: the yardstick of accuracy, the same on every machine.

What a matrix product in fp32 loses is decided by the machine's BLAS, by how many terms it adds to one number before
it begins another: for 512 terms MKL, OpenBLAS and oneDNN differ by a factor of 2.6. Here the terms are added by
PyTorch's elementwise functions, in chains as long as OpenBLAS's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")

# The additions that a sum takes at most, one after the other. OpenBLAS, torch's BLAS on aarch64, adds 256 to 384 terms
# to one number before it begins another, MKL 128: the errors of this sum are OpenBLAS's, at most 1.5 times MKL's, and
# one chain of 1024 terms makes twice, one of 4096 four times as large ones.
CHAIN = 256
# How many numbers of a product are computed at a time: as many as stay in a core's cache.
_BLOCK = 1 << 16
# The largest error of this many orders counts; of few numbers it is a matter of luck, and more orders make more.
_ORDERS, _MORE_ORDERS, _FEW = 2, 8, 1000

_aten: Any = torch.ops.aten
# Sums over the dimensions args[1], and functions of args[0] (and args[1]) that sum over dimension args[-2]
_SUMS = (_aten.sum.dim_IntList, _aten.mean.dim, _aten.logsumexp.default)
_SOFTMAXES = (_aten._softmax.default, _aten._log_softmax.default)
_SOFTMAX_GRADIENTS = (_aten._softmax_backward_data.default, _aten._log_softmax_backward_data.default)


def in_orders(
    run: Callable[[], Result], dtype: torch.dtype, fewest: int, turn: int = 0, turns: int = 1
) -> list[Result]:
    """What plain PyTorch makes in several orders of summation.

    run: computes it; fewest: the numbers that the smallest of its results has. In 16 bits rounding decides, not the
    order, so that one is enough. Where `turns` draws of the inputs share the orders, number `turn` takes its part of
    them, at least one.
    """
    count = 1 if dtype.itemsize != 4 else _ORDERS if fewest >= _FEW else _MORE_ORDERS
    results = []
    for order in range(turn, max(count, turns), turns):
        with InOrder(order):
            results.append(run())
    return results


class InOrder(TorchDispatchMode):
    """Inside, PyTorch's sums are taken in order 0, that of the terms, or in a random one."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self._order = order

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (_aten.mm.default, _aten.bmm.default):
            return self._product(*args)
        if function is _aten.addmm.default and not kwargs:
            return self._product(args[1], args[2], args[0])
        if self._order == 0:
            return function(*args, **kwargs)
        if function in _SUMS and args[1]:
            x, dims = args[0], [args[1]] if isinstance(args[1], int) else args[1]
            for dim in dims:
                x = x.index_select(dim, self._places(x.shape[dim], x.device))
            return function(x, *args[1:], **kwargs)
        if function in _SOFTMAXES or function in _SOFTMAX_GRADIENTS:
            return self._softmax(function, *args)
        return function(*args, **kwargs)

    def _places(self, size: int, device: torch.device) -> Tensor:
        if self._order == 0:
            return torch.arange(size, device=device)
        return torch.randperm(size, generator=torch.Generator().manual_seed(self._order)).to(device)

    def _softmax(self, function: Any, *args: Any) -> Tensor:
        count = 1 if function in _SOFTMAXES else 2
        dim = args[count]
        places = self._places(args[0].shape[dim], args[0].device)
        result = function(*(x.index_select(dim, places) for x in args[:count]), *args[count:])
        return result.index_select(dim, places.argsort())

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [.., M, K] @ b [.., K, N] + bias. In 16 bits a sum in fp32 that is rounded once, as processors have it."""
        if a.dtype != torch.float32:
            wide = torch.float64 if a.dtype == torch.float64 else torch.float32
            out = a.to(wide) @ b.to(wide)
            return (out if bias is None else out + bias.to(wide)).to(a.dtype)
        places = self._places(a.shape[-1], a.device)
        a, b = a.index_select(-1, places), b.index_select(-2, places)
        total = a.new_zeros((*a.shape[:-1], b.shape[-1]))
        _add_products(total, a, b)
        return total if bias is None else total + bias


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [.., M, N] += a [.., M, K] @ b [.., K, N] in at most CHAIN additions of sums of neighbours."""
    numbers, K = total.numel(), a.shape[-1]
    if not numbers or not K:
        return
    if total.dim() == 3 and len(total) == 1:
        total, a, b = total[0], a[0], b[0]
    if total.device.type == "cpu" and numbers > _BLOCK and len(total) > 1:
        pieces = min(len(total), -(-numbers // _BLOCK))
        right = [b] * pieces if total.dim() == 2 else b.tensor_split(pieces)
        for part, left, of in zip(total.tensor_split(pieces), a.tensor_split(pieces), right, strict=True):
            _add_products(part, left, of)
        return
    terms = list(zip(a.mT.contiguous().mT.split(1, -1), b.split(1, -2), strict=True))
    if K <= CHAIN:
        for column, row in terms:
            total.addcmul_(column, row)
        return
    few = torch.empty_like(total)
    for i in range(CHAIN):
        (column, row), *others = terms[i * K // CHAIN : (i + 1) * K // CHAIN]
        torch.mul(column, row, out=few)
        for column, row in others:
            few.addcmul_(column, row)
        total += few
