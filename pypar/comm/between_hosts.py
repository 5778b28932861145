"""The backend "pypar" for ranks of several hosts: shared memory inside a host, gloo between one rank of each.

What reduces or spreads goes once over the network for every host: reduce inside, exchange between the hosts' first
ranks, spread inside. What sends something else to every rank (all_to_all, gather, scatter, messages) is gloo's. Sums
are made in one order, the ranks of a host and then the hosts, wherever in a tensor a number stands.
"""

# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from pypar.comm import host_exchange
from pypar.comm.cpu_group import CpuProcessGroup
from pypar.comm.operands import reduction
from pypar.comm.process_group import ProcessGroup
from pypar.comm.work import IN_FLIGHT, ThreadWork
from pypar.ops.uncompiled import uncompiled_class

Options = Any


@uncompiled_class(IN_FLIGHT)
class ProcessGroupBetweenHosts(CpuProcessGroup):
    """torch.distributed's process group for ranks of which `hosts[rank]` says where they are."""

    def __init__(self, store: dist.Store, rank: int, hosts: list[str], timeout: timedelta, name: str) -> None:
        size = len(hosts)
        super().__init__(rank, size, name)
        names = list(dict.fromkeys(hosts))
        self._members = [[r for r in range(size) if hosts[r] == host] for host in names]
        self._host = names.index(hosts[rank])
        here = self._members[self._host]
        inside_store = dist.PrefixStore(f"host{self._host}", store)
        self._inside = ProcessGroup(
            inside_store, here.index(rank), len(here), timeout, f"{name}, inside a host"
        )
        self._flat = _gloo(dist.PrefixStore("flat", store), rank, size, timeout)
        self._between = None
        if rank == here[0]:
            self._between = _gloo(dist.PrefixStore("between", store), self._host, len(names), timeout)
        # One thread: collectives run in the order in which they were started.
        self._thread = ThreadPoolExecutor(1, "pypar collectives")

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._inside.shutdown()

    abort = shutdown

    # ---- collectives

    def allreduce(self, tensors: list[Tensor], opts: Options = None) -> ThreadWork:
        opts = opts or dist.AllreduceOptions()

        def run() -> None:
            for tensor in tensors:
                self._reduce_into(tensor, opts.reduceOp, range(len(self._members)))

        return self._start(run, tensors, opts)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Options) -> ThreadWork:
        def run() -> None:
            kept = tensors[0] if opts.rootRank == self._rank else tensors[0].clone()
            self._reduce_into(kept, opts.reduceOp, [self._host_of(opts.rootRank)])

        return self._start(run, tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Options = None) -> ThreadWork:
        opts = opts or dist.BroadcastOptions()

        def run() -> None:
            host = self._host_of(opts.rootRank)
            x = tensors[0].detach().contiguous()
            if self._host == host:
                self._broadcast_inside(x, self._members[host].index(opts.rootRank))
            if self._between is not None:
                self._between.broadcast([x], _rooted(dist.BroadcastOptions(), host)).wait()
            if self._host != host:
                self._broadcast_inside(x, 0)
            _copy(tensors[0], x)

        return self._start(run, tensors, opts)

    def barrier(self, opts: Options = None) -> ThreadWork:
        def run() -> None:
            self._inside.barrier().wait()
            if self._between is not None:
                self._between.barrier().wait()
            self._inside.barrier().wait()

        return self._start(run, [], opts)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options = None
    ) -> ThreadWork:
        def run() -> None:
            for outs, source in zip(outputs, inputs, strict=True):
                sizes = [out.nbytes for out in outs]
                for out, x in zip(outs, self._gather_all(source, sizes), strict=True):
                    _copy(out, x)

        return self._start(run, [out for outs in outputs for out in outs], opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options = None
    ) -> ThreadWork:
        return self.allgather([list(outs) for outs in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None
    ) -> ThreadWork:
        def run() -> None:
            for out, source in zip(outputs, inputs, strict=True):
                _copy(out, torch.cat(self._gather_all(source, [source.nbytes] * self._size)))

        return self._start(run, outputs, opts)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Options = None) -> ThreadWork:
        return self.all_gather_single_coalesced([output], [source], opts)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Options = None
    ) -> ThreadWork:
        opts = opts or dist.ReduceScatterOptions()

        def run() -> None:
            for out, ins in zip(outputs, inputs, strict=True):
                self._reduce_scatter(out, ins, opts.reduceOp)

        return self._start(run, outputs, opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None
    ) -> ThreadWork:
        parts = [list(source.reshape(-1).chunk(self._size)) for source in inputs]
        return self.reduce_scatter(outputs, parts, opts)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Options = None) -> ThreadWork:
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    # ---- gloo's

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None) -> dist.Work:
        return self._flat.alltoall(outputs, inputs, opts or dist.AllToAllOptions())

    def all_to_all_single(self, output: Tensor, source: Tensor, *splits: Any) -> dist.Work:
        output_splits, input_splits, opts = (*splits, None)[:3]
        run = getattr(self._flat, "all_to_all_single", None) or self._flat.alltoall_base
        return run(output, source, output_splits or [], input_splits or [], opts or dist.AllToAllOptions())

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options) -> dist.Work:
        return self._flat.gather(outputs, inputs, opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Options) -> dist.Work:
        return self._flat.scatter(outputs, inputs, opts)

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        return self._flat.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        return self._flat.recv(tensors, peer, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        return self._flat.recv_anysource(tensors, tag)

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # ----

    def _start(self, run: Callable[[], None], result: list[Tensor], opts: Options) -> ThreadWork:
        def without_gradients() -> None:
            with torch.no_grad():
                run()

        return ThreadWork(self._thread.submit(without_gradients), result)

    def _host_of(self, rank: int) -> int:
        return next(i for i, members in enumerate(self._members) if rank in members)

    def _reduce_inside(self, x: Tensor, op: Any) -> None:
        """x = the sum of this host, on its first rank."""
        if self._inside.size() > 1:
            self._inside.reduce([x], _rooted(_reducing(dist.ReduceOptions(), op), 0)).wait()

    def _broadcast_inside(self, x: Tensor, root: int) -> None:
        if self._inside.size() > 1:
            self._inside.broadcast([x], _rooted(dist.BroadcastOptions(), root)).wait()

    def _reduce_into(self, tensor: Tensor, reduce_op: Any, hosts: Any) -> None:
        """tensor = the reduction over all ranks, on the ranks of `hosts`; unspecified on the others."""
        x, op, divisor = _wide(tensor, reduce_op, self._size)
        self._reduce_inside(x, op)
        if self._between is not None:
            host_exchange.all_reduce(self._between, x, op)
        if self._host in hosts:
            self._broadcast_inside(x, 0)
            _copy(tensor, _divided(x, divisor))

    def _gather_all(self, source: Tensor, sizes: list[int]) -> list[Tensor]:
        """What each rank brought, flat; sizes: in bytes, by rank."""
        x = source.detach().contiguous()
        if x.nbytes != sizes[self._rank]:
            raise ValueError(
                f"all_gather: rank {self._rank} brings {x.nbytes} bytes, and the output has {sizes[self._rank]} for "
                "it; outputs are as large as the ranks' inputs"
            )
        bytes_ = x.reshape(-1).view(torch.uint8)
        shares = [[sizes[rank] for rank in members] for members in self._members]
        blocks = [torch.empty(sum(share), dtype=torch.uint8) for share in shares]
        here = list(blocks[self._host].split(shares[self._host]))
        options = _rooted(dist.GatherOptions(), 0)
        self._inside.gather([here] if self._between is not None else [[]], [bytes_], options).wait()
        for host, block in enumerate(blocks):
            if self._between is not None:
                self._between.broadcast([block], _rooted(dist.BroadcastOptions(), host)).wait()
            self._broadcast_inside(block, 0)
        gathered = {}
        for members, block, share in zip(self._members, blocks, shares, strict=True):
            for rank, row in zip(members, block.split(share), strict=True):
                gathered[rank] = row.view(x.dtype)
        return [gathered[rank] for rank in range(self._size)]

    def _reduce_scatter(self, out: Tensor, ins: list[Tensor], reduce_op: Any) -> None:
        by_host = torch.cat([ins[r].detach().reshape(-1) for members in self._members for r in members])
        x, op, divisor = _wide(by_host, reduce_op, self._size)
        self._reduce_inside(x, op)
        parts: list[Tensor] = []
        if self._between is not None:
            lengths = [sum(ins[r].numel() for r in members) for members in self._members]
            total = host_exchange.reduce_scatter(self._between, x, lengths, op)
            parts = list(total.split([ins[r].numel() for r in self._members[self._host]]))
        mine = torch.empty(out.numel(), dtype=x.dtype)
        self._inside.scatter([mine], [parts], _rooted(dist.ScatterOptions(), 0)).wait()
        _copy(out, _divided(mine, divisor))


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return c10d.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _wide(tensor: Tensor, reduce_op: Any, size: int) -> tuple[Tensor, Any, int]:
    """(contiguous numbers to reduce in place, the tensor's own where they will do, fp32 for bf16 and fp16; the
    operation; what to divide by in the end).
    """
    reduction(tensor, reduce_op)  # refuses what cannot be
    x = tensor.detach().contiguous()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.to(torch.float32)
    if reduce_op == dist.ReduceOp.AVG:
        return x, dist.ReduceOp.SUM, size
    return x, reduce_op, 1


def _divided(x: Tensor, divisor: int) -> Tensor:
    return x if divisor == 1 else x.div_(divisor)


def _reducing(options: Options, op: Any) -> Options:
    options.reduceOp = op
    return options


def _rooted(options: Options, root: int) -> Options:
    options.rootRank = root
    return options


def _copy(target: Tensor, source: Tensor) -> None:
    if target.data_ptr() != source.data_ptr():
        target.detach().copy_(source.reshape(target.shape))
