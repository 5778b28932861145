"""Ranks of one process under the host runtime: every rank is a device with a stream and a shared area."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(CODES)


class Ranks:
    """P devices, their areas, and what a test launches on them."""

    def __init__(self, module: ModuleType, P: int, max_bytes: int, timeout_ms: int = 60_000) -> None:
        self.module, self.P, self.max_bytes = module, P, max_bytes
        self.streams = [module.create_stream() for _ in range(P)]
        self.memory = [module.allreduce_allocate(max_bytes, 0) for _ in range(P)]
        self.area_bytes = module.allreduce_area_bytes(max_bytes)
        handles = [module.peer_handle(area, 0) for area, _ in self.memory]
        areas = [module.peer_open(handle, 0) for handle in handles]
        self.groups = [
            {
                "areas": areas,
                "rank": rank,
                "error": error,
                "max_bytes": max_bytes,
                "timeout_ms": timeout_ms,
                "device": 0,
            }
            for rank, (_, error) in enumerate(self.memory)
        ]
        self.register()

    def register(self) -> None:
        """Lets kernels touch the areas and the errors' memory."""
        for rank, (area, error) in enumerate(self.memory):
            self.module.register_buffer(area, self.area_bytes, 4, True, f"area {rank}", shared=True)
            self.module.register_buffer(error, 16, 4, True, f"error {rank}", shared=True)

    def register_tensor(self, x: Tensor, name: str, writable: bool = True) -> None:
        if x.numel():
            self.module.register_buffer(
                x.data_ptr(), x.numel() * x.element_size(), x.element_size(), writable, name
            )

    def launch(self, rank: int, x: Tensor, y: Tensor, two_shot: bool, num_blocks: int = 0) -> None:
        """Queues one all-reduce."""
        if x.data_ptr() != y.data_ptr():
            self.register_tensor(x, f"x {rank}", writable=False)
        self.register_tensor(y, f"y {rank}")
        self.module.allreduce(
            self.groups[rank], x.data_ptr(), y.data_ptr(), x.numel(), CODES[x.dtype], two_shot, num_blocks,
            self.streams[rank],
        )  # fmt: skip

    def launch_norm(
        self, rank: int, tensors: dict[str, Tensor], eps: float, two_shot: bool, num_blocks: int = 0
    ) -> None:
        """Queues one fused all-reduce, residual and rms_norm."""
        for name, x in tensors.items():
            self.register_tensor(x, f"{name} {rank}")
        addresses = {name: x.data_ptr() for name, x in tensors.items()}
        rows, D = tensors["x"].shape
        self.module.allreduce_rms_norm(
            self.groups[rank], addresses, rows, D, eps, CODES[tensors["x"].dtype], two_shot, num_blocks,
            self.streams[rank],
        )  # fmt: skip

    def run(self) -> None:
        """Runs what is queued on all devices, at the same time."""
        self.module.synchronize(self.streams[0])

    def set_last_call(self, number: int) -> None:
        """As if so many calls had been made."""
        for area, _ in self.memory:
            words = number.to_bytes(4, "little") * self.module.allreduce_layout()["max_blocks"]
            self.module.peer_write(area, words, 0)

    def errors(self) -> list[tuple[int, int, int] | None]:
        return [self.module.allreduce_error(error) for _, error in self.memory]

    def close(self) -> None:
        self.module.clear_buffers()
        for stream in self.streams:
            self.module.destroy_stream(stream)
        for area, error in self.memory:
            self.module.peer_close(area, 0)
            self.module.allreduce_free(area, error, 0)


@contextmanager
def peer_ranks(module: ModuleType, P: int, max_bytes: int, seed: int = 0, **options) -> Iterator[Ranks]:
    """Ranks whose devices are interleaved as `seed` says."""
    module.clear_buffers()
    module.set_options(
        block_order="random", thread_order="random", seed=seed, concurrent=True, max_findings=5
    )
    ranks = Ranks(module, P, max_bytes, **options)
    try:
        yield ranks
    finally:
        ranks.close()
        module.set_options()


def rank_sum(xs: list[Tensor]) -> Tensor:
    """The definition: the sum in fp32 in the order of ranks."""
    return functools.reduce(operator.add, (x.float() for x in xs))


def norm_reference(
    xs: list[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused form's definition: (residual_out, out, out not rounded)."""
    residual_out = (rank_sum(xs) + residual.float()).to(residual.dtype)
    h = residual_out.float()
    exact = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + eps) * weight.double()
    out = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()
    return residual_out, out.to(residual.dtype), exact


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_calls(
    module: ModuleType,
    P: int,
    sizes: list[int],
    dtype: torch.dtype,
    two_shots: list[bool],
    *,
    num_blocks: Sequence[int] = (0,),
    first_call: int = 0,
    **options,
) -> None:
    """One call for each size, queued without waiting in between; every result is the definition, bit for bit."""
    most = max(sizes) * dtype.itemsize
    with peer_ranks(module, P, most, **options) as ranks:
        ranks.set_last_call(first_call)
        inputs = [
            [draw(n, seed=100 * i + rank, dtype=dtype) for rank in range(P)] for i, n in enumerate(sizes)
        ]
        outputs = [[torch.full((n,), torch.nan, dtype=dtype) for _ in range(P)] for n in sizes]
        for i in range(len(sizes)):
            two_shot = two_shots[i % len(two_shots)]
            for rank in range(P):
                ranks.launch(
                    rank, inputs[i][rank], outputs[i][rank], two_shot, num_blocks[i % len(num_blocks)]
                )
        ranks.run()
        assert ranks.errors() == [None] * P, f"time-outs: {ranks.errors()}"
    for xs, ys in zip(inputs, outputs, strict=True):
        expected = rank_sum(xs).to(dtype)
        for rank, y in enumerate(ys):
            assert torch.equal(y, expected), f"rank {rank} of {P}, {len(y)} elements"
