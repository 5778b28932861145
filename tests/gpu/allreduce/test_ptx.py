"""The GPU all-reduce as nvcc compiles it, run by ptxrun: one rank's grid, for which the peers have done their part."""

import ctypes
import os
import shutil

import pytest
import torch

from pypar.selftest.judge import judge_result
from tests.gpu.allreduce.peer_ranks import DTYPES, draw, norm_reference, rank_sum
from tests.harness.ptx_attention import Launcher

FOLDER = os.environ.get("PYPAR_PTXRUN", "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="PYPAR_PTXRUN does not name the folder that holds ptxrun"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]

# As in csrc/allreduce/protocol.h and kernel.cuh.
THREADS, MAX_RANKS, MAX_BLOCKS, DATA_OFFSET = 512, 8, 64, 16384
FAILED_WORD, FLAG_WORDS = 64, 128
MARKS = {torch.float32: "10Float32Tag", torch.bfloat16: "11BFloat16Tag", torch.float16: "10Float16Tag"}


def structure(*fields):
    return type("Arguments", (ctypes.Structure,), {"_fields_": list(fields)})


def fields(kind, names):
    return [(name, kind) for name in names.split()]


CGroup = structure(
    *fields(ctypes.c_void_p, " ".join(f"area{r}" for r in range(MAX_RANKS)) + " error"),
    *fields(ctypes.c_int64, "half_bytes timeout_ns"),
    *fields(ctypes.c_int, "rank num_ranks"),
)
CCall = structure(
    ("group", CGroup),
    *fields(ctypes.c_void_p, "x y"),
    ("numel", ctypes.c_int64),
    ("two_shot", ctypes.c_int),
)
CNormCall = structure(
    ("group", CGroup),
    *fields(ctypes.c_void_p, "x residual weight residual_out out"),
    *fields(ctypes.c_int64, "rows D"),
    ("eps", ctypes.c_float),
    ("two_shot", ctypes.c_int),
)


class Areas:
    """The areas of P ranks before call number `call` of one of them: zeros, but for the call numbers."""

    def __init__(self, P, half_bytes, call):
        self.P, self.half_bytes, self.call = P, half_bytes, call
        self.bytes = [torch.zeros(DATA_OFFSET + 2 * half_bytes, dtype=torch.uint8) for _ in range(P)]
        self.error = torch.zeros(4, dtype=torch.int32)
        for rank in range(P):
            self.words(rank)[:MAX_BLOCKS] = call - 1

    def words(self, rank):
        return self.bytes[rank][:DATA_OFFSET].view(torch.int32)

    def flags(self, rank):
        """[set, stage, block, from]"""
        num_flags = 2 * 2 * MAX_BLOCKS * MAX_RANKS
        return self.words(rank)[FLAG_WORDS : FLAG_WORDS + num_flags].view(2, 2, MAX_BLOCKS, MAX_RANKS)

    def data(self, rank, dtype):
        """This call's half."""
        start = DATA_OFFSET + self.call % 2 * self.half_bytes
        return self.bytes[rank][start : start + self.half_bytes].view(dtype)

    def group(self, rank, timeout_ns=0):
        group = CGroup(half_bytes=self.half_bytes, timeout_ns=timeout_ns, rank=rank, num_ranks=self.P)
        for r, area in enumerate(self.bytes):
            setattr(group, f"area{r}", area.data_ptr())
        group.error = self.error.data_ptr()
        return group

    def peers_have_come(self, rank, stages=2):
        for peer in range(self.P):
            if peer != rank:
                self.flags(rank)[self.call % 2, :stages, :, peer] = self.call

    def launch(self, kernel, dtype, blocks, call, tensors, shared_bytes=0, **options):
        tensors = {f"area {r}": area for r, area in enumerate(self.bytes)} | tensors | {"error": self.error}
        launcher = Launcher("allreduce/launch.cu", FOLDER, tensors)
        mark = f"{kernel}_kernel.*{MARKS[dtype]}"
        launcher.launch(mark, blocks, THREADS, (call,), shared_bytes, **options)


def slices(items, P):
    """The slices of [0, items) that P ranks reduce."""
    size = -(-items // P)
    return [slice(r * size, min((r + 1) * size, items)) for r in range(P)]


def put(areas, peer, dtype, x, reduced, parts):
    """What a peer's data hold for this rank: its input, but its sum in its own part of two shots."""
    data = areas.data(peer, dtype)
    data[: x.numel()] = x
    if parts is not None:
        data[: x.numel()][parts[peer]] = reduced[parts[peer]]


def check_marks(areas, rank, blocks, stages):
    """The rank told every peer of both stages, and counted the call for every block there could be."""
    for peer in range(areas.P):
        if peer != rank:
            told = areas.flags(peer)[areas.call % 2, :, :, rank]
            assert (told[:stages, :blocks] == areas.call).all()
            assert told.count_nonzero() == stages * blocks
    assert (areas.words(rank)[:MAX_BLOCKS] == areas.call).all() and areas.words(rank)[FAILED_WORD] == 0
    assert areas.error.count_nonzero() == 0


@pytest.mark.parametrize(("P", "rank", "call"), [(2, 1, 1), (3, 0, 4), (8, 5, 7)])
@pytest.mark.parametrize("two_shot", [False, True], ids=["one shot", "two shots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce(dtype, two_shot, P, rank, call):
    numel, blocks, size = 9001, 2, 16 // dtype.itemsize
    xs = [draw(numel, seed=r, dtype=dtype) for r in range(P)]
    expected = rank_sum(xs).to(dtype)
    items = -(-numel // size)
    parts = [slice(p.start * size, p.stop * size) for p in slices(items, P)] if two_shot else None
    areas = Areas(P, items * 16, call)
    for peer in range(P):
        if peer != rank:
            put(areas, peer, dtype, xs[peer], expected, parts)
    areas.peers_have_come(rank, 1 + two_shot)
    y = torch.full((numel,), torch.nan, dtype=dtype)
    arguments = CCall(areas.group(rank), xs[rank].data_ptr(), y.data_ptr(), numel, two_shot)
    areas.launch("allreduce", dtype, blocks, arguments, {"x": xs[rank], "y": y})
    assert torch.equal(y, expected)
    theirs = areas.data(rank, dtype)[:numel]  # what peers read
    assert torch.equal(
        theirs[parts[rank]] if two_shot else theirs, expected[parts[rank]] if two_shot else xs[rank]
    )
    check_marks(areas, rank, blocks, 1 + two_shot)


@pytest.mark.parametrize("schedule", [{}, {"schedule": "warp", "seed": 1}], ids=str)
@pytest.mark.parametrize("two_shot", [False, True], ids=["one shot", "two shots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_residual_rms_norm(dtype, two_shot, schedule):
    P, rank, rows, D, eps = 3, 1, 7, 4104, 1e-5
    xs = [draw(rows, D, seed=r, dtype=dtype) for r in range(P)]
    residual, weight = draw(rows, D, seed=50, dtype=dtype), draw(D, seed=51, dtype=dtype)
    residual_out, plain, exact = norm_reference(xs, residual, weight, eps)
    parts = [slice(p.start * D, p.stop * D) for p in slices(rows, P)] if two_shot else None
    areas = Areas(P, -(-rows * D * dtype.itemsize // 16) * 16, 3)
    for peer in range(P):
        if peer != rank:
            put(areas, peer, dtype, xs[peer].flatten(), residual_out.flatten(), parts)
    areas.peers_have_come(rank, 1 + two_shot)
    tensors = {"x": xs[rank], "residual": residual, "weight": weight}
    tensors |= {name: torch.full_like(residual, torch.nan) for name in ("residual_out", "out")}
    arguments = CNormCall(areas.group(rank), rows=rows, D=D, eps=eps, two_shot=two_shot)
    for name, x in tensors.items():
        setattr(arguments, name, x.data_ptr())
    shared_bytes = D * dtype.itemsize + 2 * (THREADS // 32) * 4
    areas.launch("allreduce_rms_norm", dtype, 2, arguments, tensors, shared_bytes, **schedule)
    assert torch.equal(tensors["residual_out"], residual_out)
    judge_result("out", tensors["out"], [plain], exact).check()
    check_marks(areas, rank, 2, 1 + two_shot)


def test_a_peer_that_does_not_come():
    """The wait ends, the host is told, y stays as it was, and the next call does nothing."""
    areas, dtype = Areas(3, 4096, 5), torch.float32
    areas.peers_have_come(0, 1)
    areas.flags(0)[5 % 2, 0, 0, 2] = 3  # of rank 2 there is only its last but one call
    x, y = draw(500, seed=0), torch.full((500,), 7.0)
    arguments = CCall(areas.group(0, timeout_ns=1000), x.data_ptr(), y.data_ptr(), 500, 0)
    areas.launch("allreduce", dtype, 1, arguments, {"x": x, "y": y})
    assert areas.error.tolist() == [1, 2, 5, 0] and areas.words(0)[FAILED_WORD] == 1 and (y == 7).all()
    before = areas.flags(1).clone()
    areas.peers_have_come(0)
    areas.launch("allreduce", dtype, 1, arguments, {"x": x, "y": y})
    assert (y == 7).all() and torch.equal(areas.flags(1), before)


def test_sizes_here_are_the_kernels_own():
    cuda = pytest.importorskip("pypar._cuda")
    layout = cuda.allreduce_layout()
    assert (layout["max_ranks"], layout["max_blocks"], layout["data_offset"]) == (
        MAX_RANKS,
        MAX_BLOCKS,
        DATA_OFFSET,
    )
    for part, threads, shared_bytes in cuda.allreduce_kernels():
        assert threads == THREADS and ("rms_norm" in part) == (shared_bytes > 0)
