"""PeerAllReduce: several ranks in one process, the CUDA kernels on the host runtime's devices."""

import logging

import pytest
import torch

from pypar.comm.allreduce import peers as allreduce
from pypar.comm.allreduce.cuda import CudaPeers
from pypar.comm.allreduce.peers import all_reduce_reference, residual_norm_reference
from pypar.comm.allreduce.thresholds import Thresholds
from tests.comm.allreduce.peer_group import Recorded, peer_group, this_rank
from tests.gpu.allreduce.definition import drawn, total
from tests.harness.simt.build import simt_module, why_not

if why_not():
    pytest.skip(f"the host runtime cannot be built: {why_not()}", allow_module_level=True)

STEPS = Thresholds(1 << 10, 1 << 13, "set by the test")  # bytes: one-shot, two-shot, then the group's own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def module():
    return simt_module("allreduce", "fast")


@pytest.fixture
def group_of(monkeypatch, module):
    return lambda size, **options: peer_group(monkeypatch, options.pop("module", module), size, **options)


def test_the_references():
    parts = drawn(3, (5, 8), torch.bfloat16)
    assert torch.equal(all_reduce_reference(parts), total(parts).to(torch.bfloat16))
    residual, weight = drawn(2, (5, 8), torch.bfloat16, 1)
    out, kept = residual_norm_reference(parts, residual, weight[0], 1e-5)
    assert torch.equal(kept, (total(parts) + residual.float()).to(torch.bfloat16))
    exact = torch.nn.functional.rms_norm(kept.double(), (8,), weight[0].double(), 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_decides_and_every_rank_gets_the_same_bits(group_of, dtype):
    with group_of(3, thresholds=STEPS) as group:
        for num_bytes, method in (
            (4, "one-shot"),
            (1 << 10, "one-shot"),
            (2000, "two-shot"),
            (1 << 14, "group"),
        ):
            parts = drawn(3, (num_bytes // dtype.itemsize,), dtype, num_bytes)
            before = group.board.own_calls
            assert group.peers[0].method(parts[0])[0] == method
            results = group.call(lambda peer, rank, parts=parts: peer.all_reduce(parts[rank]))
            assert group.board.own_calls - before == (method == "group")
            for y in results:
                assert torch.equal(y, results[0])
                if method != "group":
                    assert torch.equal(y, total(parts).to(dtype))
            assert torch.equal(parts[0], drawn(3, parts[0].shape, dtype, num_bytes)[0])  # x is not written


@pytest.mark.parametrize("method", ["one-shot", "two-shot", "group"])
def test_layouts(group_of, method):
    """In place, off the 16-byte grid, transposed in and out, nothing, a 0-d tensor."""
    with group_of(2, thresholds=STEPS) as group:
        parts = drawn(2, (3, 7), torch.float32)
        expected = total(parts)
        transposed = [x.t().contiguous().t() for x in parts]
        shifted = [torch.cat([x.new_zeros(1), x.view(-1)])[1:] for x in parts]
        assert shifted[0].data_ptr() % 16
        cases = [
            (transposed, lambda x: None, expected),
            (parts, lambda x: torch.empty(7, 3).t(), expected),
            (shifted, lambda x: x, expected.view(-1)),
            ([x[0, 0] for x in parts], lambda x: None, expected[0, 0]),
            ([x[:0] for x in parts], lambda x: None, expected[:0]),
        ]
        for inputs, out_of, wanted in cases:
            outs = [out_of(x) for x in inputs]
            results = group.call(
                lambda peer, rank, inputs=inputs, outs=outs: peer.all_reduce(
                    inputs[rank], outs[rank], method=method
                )
            )
            for y, out in zip(results, outs, strict=True):
                assert torch.equal(y, wanted) and (out is None or y is out)


@pytest.mark.parametrize(
    ("rows", "D", "dtype", "weight_dtype", "fused"),
    [
        (5, 64, torch.bfloat16, torch.bfloat16, True),
        (5, 64, torch.float16, torch.float32, False),
        (3, 33, torch.float32, torch.float32, False),
    ],
)
@pytest.mark.parametrize("method", ["one-shot", "two-shot", "group"])
def test_residual_norm(group_of, module, rows, D, dtype, weight_dtype, fused, method):
    """Also where the fused kernel does not take the rows."""
    recorded = Recorded(module)
    parts = drawn(3, (rows, D), dtype)
    residual, weight = drawn(2, (rows, D), dtype, 1)
    weight = weight[0].to(weight_dtype)
    expected, kept = residual_norm_reference(parts, residual, weight, 1e-5)
    with group_of(3, module=recorded, thresholds=STEPS) as group:
        results = group.call(
            lambda peer, rank: peer.all_reduce_rms_norm(parts[rank], residual, weight, method=method)
        )
    assert ("allreduce_rms_norm" in recorded.calls) == (fused and method != "group")
    assert ("allreduce" in recorded.calls) == (not fused and method != "group")
    for out, residual_out in results:
        if method != "group":
            assert torch.equal(residual_out, kept)
        limit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, rtol=limit, atol=limit)
        assert torch.equal(out, results[0][0])


REFUSALS = {  # what is wrong -> (options, functions of the module, what the reason says)
    "one rank lacks the kernels": (
        {"refusal": lambda: "nothing was built" if this_rank() == 1 else None},
        {},
        "cuda on rank 1: nothing was built",
    ),
    "sizes differ": ({"max_bytes": [64, 128, 64]}, {}, "max_bytes differs: 64, 128, 64 by rank"),
    "no memory": (
        {},
        {"allreduce_allocate": lambda f, *a: f(*a) if this_rank() else _raise("out of memory")},
        "sharing GPU memory failed on rank 0: out of memory",
    ),
    "a handle that cannot be opened": (
        {},
        {"peer_open": lambda f, *a: f(*a) if this_rank() != 2 else _raise("peer access is not supported")},
        "opening the peers' GPU memory failed on rank 2: peer access is not supported",
    ),
    "peer access that reads something else": (
        {},
        {"peer_read": lambda f, *a: bytes(len(f(*a))) if this_rank() == 1 else f(*a)},
        "on rank 1: the memory of rank 0 does not hold what that rank wrote",
    ),
}


def _raise(text):
    raise RuntimeError(text)


@pytest.mark.parametrize("name", REFUSALS)
def test_without_peers_all_ranks_take_the_groups_own(group_of, module, name, caplog):
    options, replaced, reason = REFUSALS[name]
    recorded = Recorded(module, **replaced)
    parts = drawn(3, (10,), torch.float32)
    with caplog.at_level(logging.WARNING, "pypar"), group_of(3, module=recorded, **options) as group:
        assert {peer.engine for peer in group.peers} == {None}
        assert len({peer.reason for peer in group.peers}) == 1 and reason in group.peers[0].reason
        assert [r.message for r in caplog.records if reason in r.message] == [caplog.records[0].message]
        results = group.call(lambda peer, rank: peer.all_reduce(parts[rank]))
        assert group.peers[2].method(parts[2]) == ("group", group.peers[0].reason)
        assert group.board.own_calls == 1
    for y in results:
        torch.testing.assert_close(y, total(parts))
    assert recorded.calls.count("allreduce_free") == sum(
        name == "allreduce_allocate" for name in recorded.calls
    ) - (name == "no memory")
    assert recorded.calls.count("peer_close") == recorded.calls.count("peer_open") - (
        name.startswith("a handle")
    )


def test_a_named_backend_that_refuses_is_an_error(group_of):
    with group_of(2, backend="cuda", refusal=lambda: "nothing was built") as group:
        assert [str(error) for error in group.peers] == ["cuda on rank 0: nothing was built"] * 2


def test_ranks_that_cannot_be_peers(group_of, monkeypatch):
    with group_of(1) as group:
        assert group.peers[0].reason == "the group has 1 ranks, and the kernels are for 2 to 8"
        assert torch.equal(group.peers[0].all_reduce(torch.ones(3)), torch.ones(3))
    with group_of(9) as group:
        assert "9 ranks" in group.peers[8].reason
    monkeypatch.setattr(allreduce, "host_identity", lambda: f"host {this_rank() // 2}")
    with group_of(3) as group:
        assert group.peers[0].reason == "the ranks are on 2 hosts, and only those of one share memory"
    monkeypatch.setattr(allreduce, "host_identity", lambda: "host")
    monkeypatch.setattr(allreduce, "_gpu", lambda device: f"GPU {this_rank() % 2}")
    with group_of(3) as group:
        assert "ranks 0 and 2 share a GPU" in group.peers[1].reason


def test_tensors_that_the_kernels_do_not_take(group_of, caplog):
    """fp64 is told of once; a tensor beyond the buffers is not, as one beyond the thresholds is not."""
    with caplog.at_level(logging.WARNING, "pypar"), group_of(2, max_bytes=64) as group:
        for _ in range(2):
            group.call(lambda peer, rank: peer.all_reduce(torch.ones(3, dtype=torch.float64)))
            group.call(lambda peer, rank: peer.all_reduce(torch.ones(17)))
        assert group.board.own_calls == 4
        assert [record.message for record in caplog.records] == [
            "PeerAllReduce takes the group's own all-reduce: float64 is not one of float32, bfloat16, float16"
        ]
        peer = group.peers[0]
        assert peer.supports(torch.ones(17)) == "x has 68 bytes, and the buffers were made for 64"
        with pytest.raises(ValueError, match="method one-shot cannot take x: float64 is not one of"):
            peer.all_reduce(torch.ones(3, dtype=torch.float64), method="one-shot")
        with pytest.raises(ValueError, match="must be like x"):
            peer.all_reduce(torch.ones(3), torch.ones(4))
        with pytest.raises(ValueError, match="x requires a gradient"):
            peer.all_reduce(torch.ones(3, requires_grad=True))
        with pytest.raises(ValueError, match="is none of one-shot, two-shot, group"):
            peer.all_reduce(torch.ones(3), method="three-shot")


@pytest.mark.parametrize("method", ["one-shot", "two-shot"])
def test_a_rank_that_does_not_come_is_named(group_of, module, method):
    """At the next check, and for ever; nothing is freed that a peer may still read."""
    recorded, x = Recorded(module), torch.ones(100)
    with group_of(3, module=recorded, kind=CudaPeers, timeout_s=0.05) as group:
        for rank in (0, 2):
            group.peers[rank].all_reduce(x, method=method)
        group.synchronize()
        for rank in (0, 2):
            for call in (group.peers[rank].check, lambda peer=group.peers[rank]: peer.all_reduce(x)):
                with pytest.raises(
                    RuntimeError, match=f"rank {rank} waited in vain for the data of rank 1 in call 1"
                ):
                    call()
        group.peers[1].check()
        for rank in (0, 2):
            group.peers[rank].close()
        assert "allreduce_free" not in recorded.calls
        group.peers[1]._peers = None  # it would wait for the others


def test_peers_are_closed_before_memory_is_freed(group_of, module):
    recorded = Recorded(module)
    with group_of(3, module=recorded) as group:
        group.call(lambda peer, rank: peer.close())
        assert recorded.order("peer_close", "allreduce_free") == ["peer_close"] * 6 + ["allreduce_free"] * 3
        group.call(lambda peer, rank: peer.close())
        assert recorded.calls.count("allreduce_free") == 3
        assert group.peers[0].supports(torch.ones(1)) == "it was closed"


def test_the_pattern_of_the_copy_fits_small_buffers(group_of, module):
    """It was 4 KiB whatever the buffer was."""
    written = []

    def peer_write(original, address, data, device):
        written.append(len(data))
        original(address, data, device)

    with group_of(2, module=Recorded(module, peer_write=peer_write), max_bytes=1) as group:
        assert group.peers[0].reason is None
    most = module.allreduce_area_bytes(1) - module.allreduce_layout()["data_offset"]
    assert len(written) == 2 and max(written) <= most


def test_rank_0s_thresholds_hold_for_all(group_of):
    with group_of(2, thresholds=[STEPS, STEPS._replace(one_shot_max_bytes=0)]) as group:
        assert [peer.thresholds for peer in group.peers] == [STEPS, STEPS]
