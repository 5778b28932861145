"""The torch.distributed backend "pypar": CPU tensors, shared memory inside a host, gloo between hosts.

    import pypar.comm
    torch.distributed.init_process_group("pypar")

Results are summed in one order, neighbours first and then neighbours of their sums, bf16 and fp16 in fp32, so they are
the same bits on all ranks and in every run, also where groups of 2, 4, 8, ... neighbours are summed first.
"""

# mypy: disable-error-code="override, assignment"
# torch's stubs describe the group's C++ side, with other argument names and one overload for every old form.

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pypar.comm.cpu_group import CpuProcessGroup
from pypar.comm.operands import dense, equal_parts, in_background, part, reduction, row_parts, type_code
from pypar.comm.shared_memory import map_together, open_group
from pypar.comm.work import IN_FLIGHT, FinishedWork, Work, complete
from pypar.ops.native import address
from pypar.ops.uncompiled import uncompiled_class

Options = Any  # torch's per-collective option structs


@uncompiled_class(IN_FLIGHT)
class ProcessGroup(CpuProcessGroup):
    """torch.distributed's process group over shared memory; all ranks on one host."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, name: str) -> None:
        super().__init__(rank, size, name)
        self._timeout = timeout
        self.native = open_group(store, list(range(size)), rank, timeout, name)
        self._num_memories = 0
        self._started: deque[Work] = deque()  # keeps tensors alive while they are in use
        self._sweep_at = 64
        self._to_complete: queue.SimpleQueue[Work | None] | None = None
        # When the group is forgotten, and before the interpreter ends: no thread may outlive that.
        weakref.finalize(self, self.native.shut_down)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self.native.set_timeout(timeout.total_seconds())

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the threads. Started work that is not done fails, and its tensors are released."""
        self.native.shut_down()
        self._started.clear()
        if self._to_complete is not None:
            self._to_complete.put(None)
            self._to_complete = None

    def map_memory(self, part_bytes: int) -> Any:
        """Memory of `part_bytes` that all ranks see; every rank of the group calls this, in one order."""
        self._num_memories += 1
        return map_together(
            self.native, self._rank, self._size, part_bytes, self._num_memories, self._timeout
        )

    # ---- collectives

    def allreduce(self, tensors: list[Tensor], opts: Options = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        return self._reduce_all(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Options = None) -> Any:
        return self._reduce_all(tensors, opts or dist.AllreduceCoalescedOptions())

    def _reduce_all(self, tensors: list[Tensor], opts: Options) -> Any:
        copies: list = []
        works = []
        for tensor in tensors:
            flat = dense(tensor, copies, reads=True)
            code, op = reduction(flat, opts.reduceOp)
            works.append(self.native.all_reduce(address(flat), flat.numel(), code, op, opts.asyncOp))
        return self._work(works, tensors, copies)

    def reduce(self, tensors: list[Tensor], opts: Options) -> Any:
        copies: list = []
        flat = dense(tensors[0], copies, reads=True)
        code, op = reduction(flat, opts.reduceOp)
        arguments = address(flat), flat.numel(), code, op, opts.rootRank, opts.asyncOp
        return self._work([self.native.reduce(*arguments)], tensors, copies)

    def broadcast(self, tensors: list[Tensor], opts: Options = None) -> Any:
        opts = opts or dist.BroadcastOptions()
        copies: list = []
        flat = dense(tensors[0], copies, reads=True)
        arguments = part(flat), type_code(flat), opts.rootRank, opts.asyncOp
        return self._work([self.native.broadcast(*arguments)], tensors, copies)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options = None) -> Any:
        copies: list = []
        works = []
        for outs, source in zip(outputs, inputs, strict=True):
            flat = dense(source, copies, reads=True, writes=False)
            parts = [part(dense(out, copies, reads=False)) for out in outs]
            works.append(self.native.all_gather(part(flat), parts, type_code(flat), in_background(opts)))
        return self._work(works, [out for outs in outputs for out in outs], copies, inputs)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options = None
    ) -> Any:
        """outputs[r][i] receives rank r's inputs[i]."""
        return self.allgather([list(outs) for outs in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Options = None) -> Any:
        return self.all_gather_single_coalesced([output], [source], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None
    ) -> Any:
        copies: list = []
        works = []
        for output, source in zip(outputs, inputs, strict=True):
            flat = dense(source, copies, reads=True, writes=False)
            parts = equal_parts(
                dense(output, copies, reads=False), self._size, "output", flat.numel() * self._size
            )
            works.append(self.native.all_gather(part(flat), parts, type_code(flat), in_background(opts)))
        return self._work(works, outputs, copies, inputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Options = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        copies: list = []
        works = []
        for output, ins in zip(outputs, inputs, strict=True):
            out = dense(output, copies, reads=False)
            flats = [dense(x, copies, reads=True, writes=False) for x in ins]
            if flats[self._rank].numel() != out.numel():
                raise ValueError(
                    f"output {tuple(output.shape)} must be like input {self._rank}: {tuple(ins[self._rank].shape)}"
                )
            code, op = reduction(out, opts.reduceOp)
            parts = [part(flat) for flat in flats]
            works.append(self.native.reduce_scatter(parts, address(out), code, op, opts.asyncOp))
        return self._work(works, outputs, copies, inputs)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Options = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None
    ) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        copies: list = []
        works = []
        for output, source in zip(outputs, inputs, strict=True):
            out = dense(output, copies, reads=False)
            flat = dense(source, copies, reads=True, writes=False)
            parts = equal_parts(flat, self._size, "input", out.numel() * self._size)
            code, op = reduction(out, opts.reduceOp)
            works.append(self.native.reduce_scatter(parts, address(out), code, op, opts.asyncOp))
        return self._work(works, outputs, copies, inputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Options = None) -> Any:
        copies: list = []
        ins = [dense(x, copies, reads=True, writes=False) for x in inputs]
        outs = [part(dense(x, copies, reads=False)) for x in outputs]
        work = self.native.all_to_all([part(x) for x in ins], outs, type_code(ins[0]), in_background(opts))
        return self._work([work], outputs, copies, inputs)

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        opts: Options = None,
    ) -> Any:
        copies: list = []
        flat = dense(source, copies, reads=True, writes=False)
        out = dense(output, copies, reads=False)
        ins = row_parts(flat, source, input_splits, self._size, "input")
        outs = row_parts(out, output, output_splits, self._size, "output")
        return self._work(
            [self.native.all_to_all(ins, outs, type_code(flat), in_background(opts))],
            [output],
            copies,
            [source],
        )

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Options) -> Any:
        copies: list = []
        flat = dense(inputs[0], copies, reads=True, writes=False)
        outs = outputs[0] if opts.rootRank == self._rank else []
        parts = [part(dense(out, copies, reads=False)) for out in outs]
        work = self.native.gather(part(flat), parts, type_code(flat), opts.rootRank, in_background(opts))
        return self._work([work], outs, copies, inputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Options) -> Any:
        copies: list = []
        ins = inputs[0] if opts.rootRank == self._rank else []
        parts = [part(dense(x, copies, reads=True, writes=False)) for x in ins]
        out = dense(outputs[0], copies, reads=False)
        work = self.native.scatter(parts, part(out), type_code(out), opts.rootRank, in_background(opts))
        return self._work([work], outputs, copies, inputs)

    def gather_pieces(self, own: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> Any:
        """parts[r] receives rank r's own pieces, one after the other; contiguous tensors, in the background."""
        outs = [[part(x) for x in pieces] for pieces in parts]
        work = self.native.gather_pieces([part(x) for x in own], outs, type_code(own[0]), True)
        return self._work([work], list(own), [], own, parts)

    def reduce_pieces(self, parts: Sequence[Sequence[Tensor]], out: Sequence[Tensor]) -> Any:
        """out receives the sum of every rank's parts[this rank]; contiguous tensors, in the background."""
        code, op = reduction(out[0], dist.ReduceOp.SUM)
        ins = [[part(x) for x in pieces] for pieces in parts]
        work = self.native.reduce_pieces(ins, [part(x) for x in out], code, op, True)
        return self._work([work], list(out), [], parts, out)

    def barrier(self, opts: Options = None) -> Any:
        return self._work([self.native.barrier(in_background(opts))], [], [])

    # ---- messages

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        copies: list = []
        flat = dense(tensors[0], copies, reads=True, writes=False)
        return self._work([self.native.send(part(flat), peer, tag)], tensors, copies)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        copies: list = []
        flat = dense(tensors[0], copies, reads=False)
        return self._work([self.native.receive(part(flat), peer, tag)], tensors, copies)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Any:
        return self.recv(tensors, -1, tag)

    # ---- torch <= 2.12 calls the same by other names

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # ----

    def _work(self, works: list, result: list[Tensor], copies: list, *alive: Any) -> Any:
        """What a call returns. Collectives that were not started in the background have run: their `works` are None."""
        targets = [(target, source) for target, source, writes in copies if writes]

        def finish() -> None:
            with torch.no_grad():
                for target, source in targets:
                    target.copy_(source)

        if not works or works[-1] is None:
            if targets:
                finish()
            return FinishedWork(result)
        work = Work(self, works, result, finish if targets else None, (copies, alive))
        while self._started and self._started[0].is_completed():
            self._started.popleft()
        self._started.append(work)
        if len(self._started) > self._sweep_at:  # the first one takes long
            self._started = deque(work for work in self._started if not work.is_completed())
            self._sweep_at = 2 * len(self._started) + 64
        return work

    def complete_later(self, work: Work) -> None:
        """Sets the work's future when it is done. One thread of the group does it for all."""
        if self._to_complete is None:
            self._to_complete = queue.SimpleQueue()
            threading.Thread(
                target=complete, args=(self._to_complete,), daemon=True, name="pypar futures"
            ).start()
        self._to_complete.put(work)
