"""PowerSGD: matrices travel as two thin factors (Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727).

With M_w the gradient of rank w as a matrix [m, n], plus what earlier steps did not send, and Q [n, r] the second factor
of the step before, one step of subspace iteration is

    P = sum_w M_w Q          all-reduce of m r numbers
    P = orthogonal(P)
    Q = sum_w M_w^T P        all-reduce of n r numbers
    the sum of gradients is taken to be P Q^T; rank w keeps the error M_w - P (M_w^T P)^T

and (m + n) r numbers travel for m n. The error is each rank's own part of the loss, so it is never larger than M_w, and
the errors' sum is what the sum lacks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pypar.comm import all_reduce_start
from pypar.data_parallel.flat import Bucket, Slot
from pypar.mesh import Axis

# Factors start on cache lines, so that a product's bits do not depend on where in a message its operand lies.
_ALIGNED = 16  # numbers


def factored_shape(shape: torch.Size, rank: int) -> tuple[int, int] | None:
    """(m, n) of a gradient that is smaller as two factors, else None. Dimensions after the first count as one."""
    if len(shape) < 2 or not shape.numel():
        return None
    m, n = shape[0], shape.numel() // shape[0]
    return (m, n) if (m + n) * rank < m * n else None


class PowerSGD:
    """Reduces buckets by factors of ``rank``: a `Reduction` of GradientBuckets.

    Computes in fp32 (fp64 for gradients of that dtype), starts from a fixed seed and gives the same bits on all ranks
    whose processors are of one kind, for any bucket size. Vectors and small matrices are summed as they are. Costs, for
    each matrix, an error of its size and a factor Q; `state_dict()` has them, by the parameters' names in the buckets.
    """

    def __init__(self, rank: int, *, average: bool = False, seed: int = 0) -> None:
        if rank != int(rank) or rank < 1:
            raise ValueError(
                f"power_sgd_rank ({rank}) must be a positive whole number; 1 to 4 are usual, and 0 switches "
                "compression off"
            )
        self.rank, self.average, self._seed = rank, average, seed
        self._errors: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._open: list[_StartedReduction] = []  # whose second factors are not sent yet

    @torch.no_grad()
    def reduce_start(self, bucket: Bucket, axis: Axis) -> _StartedReduction:
        """Sends the first factors. The second ones go out when the next bucket is started, or when a bucket is waited
        for: in one order on all ranks, and beside the backward of the next bucket's gradients.
        """
        started = _StartedReduction(self, bucket, axis)
        self.send_second_factors()
        self._open.append(started)
        return started

    def send_second_factors(self) -> None:
        """Send the second factors of all reductions that have not sent theirs."""
        while self._open:
            self._open.pop(0).send_second_factors()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """This rank's errors [m, n] (they differ between ranks) and factors Q [n, r] (they do not), by name."""
        return {"errors": dict(self._errors), "factors": dict(self._factors)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Goes on from what `state_dict()` gave on this rank, with the same parameters and rank."""
        for name, factor in state["factors"].items():
            if factor.shape[1] != self.rank:
                raise ValueError(
                    f"the factor of {name!r} was made with power_sgd_rank={factor.shape[1]}, this run has "
                    f"{self.rank}; use one rank, or start without the saved state"
                )
        self._errors = {name: x.clone() for name, x in state["errors"].items()}
        self._factors = {name: x.clone() for name, x in state["factors"].items()}

    def matrix_of(self, slot: Slot, m: int, n: int, dtype: torch.dtype) -> _Matrix:
        """What this rank has to send of a gradient. The error's memory holds it until the error is known."""
        device = slot.gradient.device
        if slot.name not in self._errors:
            self._errors[slot.name] = torch.zeros(m, n, dtype=dtype, device=device)
            self._factors[slot.name] = self._first_factor(slot.name, n).to(device, dtype)
        error, factor = self._errors[slot.name], self._factors[slot.name]
        if error.shape != (m, n):
            raise ValueError(
                f"the PowerSGD error of {slot.name} is {tuple(error.shape)}, its gradient is [{m}, {n}]; load a "
                "state that was saved with the same parameters"
            )
        return _Matrix(slot, error.add_(slot.gradient.view(m, n)), factor)

    def keep_factor(self, matrix: _Matrix, factor: Tensor) -> None:
        """Keep a factor for the next step; orthogonal, since nearly parallel directions lose digits. Where numbers
        overflowed, on any rank, all ranks forget: an error that is not a number would spoil every step to come.
        """
        is_finite = factor.isfinite().all()
        if factor.is_cuda or not is_finite:  # a GPU is not asked, which would synchronise it
            matrix.sent.masked_fill_(~is_finite, 0.0)
            first = self._first_factor(matrix.slot.name, len(factor)).to(factor.device, factor.dtype)
            factor = torch.where(is_finite, factor, first)
        self._factors[matrix.slot.name] = _orthogonal(factor)

    def _first_factor(self, name: str, n: int) -> Tensor:
        """Numbers that depend on the seed and the name alone: the same on all ranks, for any buckets."""
        generator = torch.Generator().manual_seed((self._seed << 32) + zlib.crc32(name.encode()))
        return torch.randn(n, self.rank, generator=generator)


@dataclass
class _Matrix:
    slot: Slot
    sent: Tensor  # [m, n]: this rank's gradient and its error, then the new error
    factor: Tensor  # Q [n, r] of the last step
    basis: Tensor | None = None  # P [m, r], orthogonal


class _StartedReduction:
    """One bucket under way."""

    def __init__(self, owner: PowerSGD, bucket: Bucket, axis: Axis) -> None:
        self._owner, self._axis = owner, axis
        dtype = torch.promote_types(bucket.flat.dtype, torch.float32)
        self._matrices: list[_Matrix] = []
        self._plain: list[Slot] = []
        for slot in bucket.slots:
            shape = factored_shape(slot.shape, owner.rank)
            if shape is None:
                self._plain.append(slot)
            else:
                self._matrices.append(owner.matrix_of(slot, *shape, dtype))
        sizes = [len(matrix.sent) * owner.rank for matrix in self._matrices]
        sizes += [slot.numel for slot in self._plain]
        self._first, parts = _message(sizes, bucket.flat, dtype)
        self._first_parts = parts
        for matrix, part in zip(self._matrices, parts, strict=False):
            torch.mm(matrix.sent, matrix.factor, out=part.view(-1, owner.rank))
        for slot, part in zip(self._plain, parts[len(self._matrices) :], strict=True):
            part.copy_(slot.gradient.view(-1))
        self._handle = all_reduce_start(self._first, axis)

    @torch.no_grad()
    def send_second_factors(self) -> None:
        self._handle.wait()
        _used_on_this_stream(self._first)
        rank = self._owner.rank
        sizes = [matrix.sent.shape[1] * rank for matrix in self._matrices]
        self._second, self._second_parts = _message(sizes, self._first, self._first.dtype)
        for matrix, p, q in zip(self._matrices, self._first_parts, self._second_parts, strict=False):
            matrix.basis = _orthogonal(p.view(-1, rank))
            own = torch.mm(matrix.sent.t(), matrix.basis, out=q.view(-1, rank))
            matrix.sent.addmm_(matrix.basis, own.t(), alpha=-1.0)
        if sizes:
            self._handle = all_reduce_start(self._second, self._axis)

    @torch.no_grad()
    def wait(self) -> None:
        """Returns when the bucket holds the sum, or the mean."""
        self._owner.send_second_factors()
        self._handle.wait()
        _used_on_this_stream(self._first, self._second)
        owner = self._owner
        factor = 1.0 / self._axis.size if owner.average else 1.0
        for matrix, part in zip(self._matrices, self._second_parts, strict=True):
            assert matrix.basis is not None
            q = part.view(-1, owner.rank)
            product = matrix.basis @ (q.t() * factor)
            matrix.slot.gradient.copy_(product.view(matrix.slot.gradient.shape))
            _used_on_this_stream(matrix.basis)
            owner.keep_factor(matrix, q)
        for slot, part in zip(self._plain, self._first_parts[len(self._matrices) :], strict=True):
            slot.gradient.copy_((part * factor).view(slot.gradient.shape))


def _orthogonal(columns: Tensor) -> Tensor:
    """Orthogonal columns of the same span; as many also where there are fewer directions than columns, or none."""
    return torch.linalg.qr(columns).Q.contiguous()


def _message(sizes: list[int], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(a flat buffer, its parts of these sizes)."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // _ALIGNED) * _ALIGNED
    flat = torch.zeros(total, dtype=dtype, device=like.device)
    return flat, [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _used_on_this_stream(*tensors: Tensor) -> None:
    """Tensors that were made on another stream of a GPU: their memory must outlive this stream's use of it."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
