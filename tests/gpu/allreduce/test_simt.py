"""The GPU all-reduce under the host runtime: several devices in one process, interleaved, with late stores."""

import pytest
import torch

from tests.gpu.allreduce.peer_ranks import DTYPES, check_calls, draw, norm_reference, peer_ranks, rank_sum
from tests.harness.simt.build import simt_module, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("two_shot", [False, True], ids=["one shot", "two shots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", range(2, 9))
def test_every_number_of_ranks_and_dtype(P, dtype, two_shot):
    check_calls(simt_module("allreduce", "fast"), P, [1, 7, 63, 1023, 4096], dtype, [two_shot], seed=P)


@pytest.mark.parametrize("seed", range(4))
def test_calls_of_all_kinds_in_a_row(seed):
    """Without waiting for each other's end, one and two shots by turns, grids of several sizes."""
    sizes = [1023, 8, 111, 1, 1024, 63, 700]
    check_calls(simt_module("allreduce", "checked"), 3, sizes, torch.bfloat16, [False, True, True], seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_grids_of_other_sizes_in_a_row(seed):
    """All blocks count all calls, also those of smaller grids: else two of them would use different halves."""
    module, grids = simt_module("allreduce", "checked"), [1, 2, 1, 3, 1]
    check_calls(module, 2, [700] * 10, torch.float32, [False], seed=seed, num_blocks=grids)
    check_calls(module, 2, [1500, 20, 1500], torch.float32, [True, False], seed=seed, num_blocks=grids)


def test_call_numbers_wrap_around():
    module = simt_module("allreduce", "fast")
    check_calls(
        module, 3, [100] * 9, torch.float32, [False, True], seed=5, first_call=2**32 - 5, timeout_ms=1000
    )


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_misaligned(dtype, two_shot):
    module = simt_module("allreduce", "checked")
    with peer_ranks(module, 2, 4096, 3) as ranks:
        wholes = [draw(300, seed=rank, dtype=dtype) for rank in range(2)]
        before = [x.clone() for x in wholes]
        for rank in range(2):
            ranks.launch(rank, wholes[rank][1:288], wholes[rank][1:288], two_shot)
        ranks.run()
    expected = rank_sum([x[1:288] for x in before]).to(dtype)
    for x, y in zip(before, wholes, strict=True):
        assert torch.equal(y[1:288], expected)
        assert y[0] == x[0] and torch.equal(y[288:], x[288:])


def test_signed_zeros_and_infinities():
    module = simt_module("allreduce", "fast")
    xs = [torch.tensor([-0.0, -0.0, torch.inf, 1e38]), torch.tensor([-0.0, 0.0, -torch.inf, 3e38])]
    with peer_ranks(module, 2, 64) as ranks:
        ys = [torch.empty(4) for _ in xs]
        for rank in range(2):
            ranks.launch(rank, xs[rank], ys[rank], False)
        ranks.run()
    for y in ys:
        assert (
            torch.equal(y[:2].signbit(), torch.tensor([True, False])) and y[2].isnan() and y[3] == torch.inf
        )


# ---- fused with residual and rms_norm


def check_norm(module, sizes, dtype, two_shot, *, seed=0, num_blocks=0, in_place=False):
    P, rows, D = sizes
    eps = 1e-5
    with peer_ranks(module, P, rows * D * dtype.itemsize, seed) as ranks:
        residual, weight = draw(rows, D, seed=50, dtype=dtype), draw(D, seed=51, dtype=dtype)
        xs = [draw(rows, D, seed=rank, dtype=dtype) for rank in range(P)]
        expected = norm_reference(xs, residual, weight, eps)
        results = []
        for rank in range(P):
            tensors = {"x": xs[rank], "residual": residual.clone(), "weight": weight.clone()}
            tensors["residual_out"] = (
                tensors["residual"] if in_place else torch.full_like(residual, torch.nan)
            )
            tensors["out"] = tensors["x"] if in_place else torch.full_like(residual, torch.nan)
            results.append(tensors)
            ranks.launch_norm(rank, tensors, eps, two_shot, num_blocks)
        ranks.run()
        assert ranks.errors() == [None] * P
    residual_out, plain, exact = expected
    limit = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max() * 2**-8
    for tensors in results:
        assert torch.equal(tensors["residual_out"], residual_out)
        assert torch.equal(tensors["out"], results[0]["out"])  # the same bits on all ranks
        assert (tensors["out"].double() - exact).abs().max() <= limit


@pytest.mark.parametrize("two_shot", [False, True], ids=["one shot", "two shots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 5, 264), (3, 1, 1024), (8, 11, 40)], ids=str)  # P, rows, D
def test_fused_norm(sizes, dtype, two_shot):
    check_norm(simt_module("allreduce", "fast"), sizes, dtype, two_shot, seed=sizes[0])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("two_shot", [False, True])
def test_fused_norm_checked(two_shot, in_place):
    module = simt_module("allreduce", "checked")
    check_norm(module, (3, 7, 72), torch.bfloat16, two_shot, seed=1, num_blocks=2, in_place=in_place)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "numel", "message"),
    [
        ({}, 1025, "4100 bytes; the group's areas were made for 4096"),
        ({"rank": 2}, 8, "rank 2 is not one of 2"),
        ({"areas": [0] * 9}, 8, "9 ranks; it takes 2 to 8"),
        ({"areas": [16]}, 8, "1 ranks; it takes 2 to 8"),
        ({"areas": [16, 0]}, 8, "the area of rank 1 is no address"),
        ({"timeout_ms": -1}, 8, "timeout_ms -1 is not 0"),
        ({"error": 0}, 8, "address of error is null"),
        ({}, -1, "-1 elements; numel is 0 to"),
    ],
)
def test_refusals(changes, numel, message):
    module = simt_module("allreduce", "fast")
    with peer_ranks(module, 2, 4096) as ranks:
        group = ranks.groups[0] | changes
        with pytest.raises(ValueError, match=message):
            module.allreduce(group, 64, 64, numel, 0, False, 0, ranks.streams[0])


def test_refusals_of_tensors():
    module = simt_module("allreduce", "fast")
    with peer_ranks(module, 2, 4096) as ranks:
        group, stream = ranks.groups[0], ranks.streams[0]
        for arguments, message in (
            ((64, 66, 8, 0, False, 0), "y's address must be a multiple of 4"),
            ((64, 64, 8, 3, False, 0), "dtype code 3"),
            ((64, 64, 8, 0, False, 65), "65 blocks; give 1 to 64"),
        ):
            with pytest.raises(ValueError, match=message):
                module.allreduce(group, *arguments, stream)
        names = ("x", "residual", "weight", "residual_out", "out")
        for D, changes, message in (
            (12, {}, "rows of 12 elements; the fused form takes multiples of 8"),
            (16, {"weight": 72}, "weight's address must be a multiple of 16"),
        ):
            tensors = dict.fromkeys(names, 64) | changes
            with pytest.raises(ValueError, match=message):
                module.allreduce_rms_norm(group, tensors, 2, D, 1e-5, 1, False, 0, stream)


def test_peers_read_each_others_memory():
    module = simt_module("allreduce", "fast")
    with peer_ranks(module, 2, 4096) as ranks:
        at = ranks.groups[0]["areas"][1] + module.allreduce_layout()["data_offset"]
        pattern = bytes(range(200))
        module.peer_write(at, pattern, 0)
        assert module.peer_read(at, 200, 0) == pattern
        with pytest.raises(ValueError, match="a multiple of 4 bytes"):
            module.peer_read(at, 3, 0)
    with pytest.raises(ValueError, match="a handle has 64 bytes, not 3"):
        module.peer_open(b"abc", 0)
