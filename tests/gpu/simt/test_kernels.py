"""The host runtime for CUDA kernels: right ones give right numbers in silence, planted faults are found."""

import pytest
import torch

from tests.harness.simt.build import KERNELS, buffers, kernel_module, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

FLAVOURS = ("fast", "checked")
ORDERS = [("linear", 0), ("reverse", 0), ("random", 1), ("random", 2)]


def vector_add(module, count=1000):
    a, b = torch.randn(2, count)
    a, b = a.clone(), b.clone()
    with buffers(module, a=a, b=b):
        out = torch.zeros(count)
        module.vector_add(a.data_ptr(), b.data_ptr(), out.data_ptr(), count, 0)
    torch.testing.assert_close(out, a + b, rtol=0, atol=0)


def block_sum(module, rows=7, columns=333):
    x = torch.randn(rows, columns)
    with buffers(module, x=x):
        out = torch.full((rows,), torch.nan)
        module.block_sum(x.data_ptr(), out.data_ptr(), rows, columns, 0)
    torch.testing.assert_close(out, x.double().sum(1).float(), rtol=0, atol=1e-5)
    return out


def product_inputs(M, N, K, dtype):
    """Small integers: every sum is exact, so any wrong element is seen."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (M + 64, K), generator=generator).to(dtype)[
        :M
    ]  # nothing else lies right behind it
    return a, torch.randint(-8, 9, (K, N), generator=generator).to(dtype)


def tile_product(module, M=100, N=72, K=88, dtype=torch.bfloat16):
    a, b = product_inputs(M, N, K, dtype)
    with buffers(module, a=a, b=b):
        c = torch.full((M, N), torch.nan)
        is_bf16 = dtype == torch.bfloat16
        module.tile_product(a.data_ptr(), b.data_ptr(), c.data_ptr(), M, N, K, is_bf16, 0)
    assert torch.equal(c, a.float() @ b.float())


def exchange(module):
    x = torch.arange(64, dtype=torch.int32)
    with buffers(module, x=x):
        out = torch.zeros_like(x)
        module.exchange(x.data_ptr(), out.data_ptr(), 0)
    assert torch.equal(out, x ^ 1)


RUNS = {
    "vector_add": vector_add,
    "block_sum": block_sum,
    "tile_product": tile_product,
    "warp_operations": exchange,
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kernel", RUNS)
def test_right_kernels_are_silent_in_every_order(kernel, flavour):
    module = kernel_module(flavour)
    try:
        for order, seed in ORDERS:
            for early in (False, True):
                module.set_options(block_order=order, thread_order=order, seed=seed, early_copies=early)
                RUNS[kernel](module)
    finally:
        module.set_options()


RACE = "no barrier is between"
DIVERGENT = "divergent barrier"
# What is planted, where (the text of a line of the kernel), and what is said of it.
FAULTS = [
    ("vector_add", "OUT_OF_BOUNDS", "out[i] = a[i] + b[i];", r"\(104,0,0\) reads 4 bytes .* just after the end of"),
    ("vector_add", "INPUT_WRITTEN", "const_cast", r"writes 4 bytes .* buffer a of 4000 bytes is an input"),
    ("vector_add", "MISALIGNED", "reinterpret_cast<const float2", "misaligned: .* 4 bytes after a multiple of 8"),
    ("vector_add", "BLOCKS_RACE", "out[threadIdx.x]", r"race: .* which block \(0,0,0\) .* in any order"),
    ("vector_add", "BLOCKS_READ", "out[i - 1]", r"race: .* reads .* which block \(0,0,0\) .* in any order"),
    ("block_sum", "SHARED_OUT_OF_BOUNDS", "sums[warp + 1]", "out of bounds: .* takes element 4 of a shorter array"),
    ("block_sum", "NEVER_WRITTEN", "sums[lane]", "read of shared memory never written"),
    ("block_sum", "DIVERGENT_BARRIER", "if (warp == 0) __syncthreads();", f"{DIVERGENT}: .* in another one at"),
    ("block_sum", "BARRIER_NOT_REACHED", "if (warp == 0) __syncthreads();", f"{DIVERGENT}: .* in another one at"),
    ("block_sum", "DIVERGENT_SHUFFLE", "x += __shfl_xor_sync", f"{DIVERGENT}: .* no thread can go on: 64"),
    ("block_sum", "RACE", "sums[lane]", RACE),
    ("block_sum", "RACE_AFTER_READ", "sums[lane]", rf"writes .* which thread .* read at .* {RACE}"),
    ("tile_product", "COPY_OUT_OF_BOUNDS", "a + element, true", "reads 16 bytes .* buffer a of 17600 bytes"),
    ("tile_product", "MISSING_WAIT", "load_matrix_x4(a_part", "missing wait: .* has not been waited"),
    ("tile_product", "ONE_BUFFER", "ptx::copy_async_16(buffer", "missing wait: .* writes .* has not been waited"),
    ("tile_product", "NO_BARRIER_BEFORE", "load_matrix_x4(a_part", rf"race: .* reads .* wrote at .* {RACE}"),
    ("tile_product", "NO_BARRIER_AFTER", "load_matrix_trans_x4", rf"race: .* writes .* read at .* {RACE}"),
    ("tile_product", "ROW_MISALIGNED", "lane / 16 * 4", "misaligned: .* gives ldmatrix at"),
    ("tile_product", "ROW_OUT_OF_BOUNDS", "+ 256", "out of bounds: .* of 19456 of dynamic shared memory"),
    ("tile_product", "PADDING_READ", "* 8 + 8", "read of shared memory never written: .* dynamic shared memory"),
    ("tile_product", "DIVERGENT_MMA", "a_part, right", "divergent warp operation: .* in ldmatrix at .* in mma at"),
    ("warp_operations", "WRONG_MASK", "values[thread ^ 16]", f"race: .* {RACE}"),
    ("warp_operations", "SHUFFLE_IS_NO_BARRIER", "values[other]", f"race: .* {RACE}"),
    ("warp_operations", "LANE_NOT_IN_MASK", "__syncwarp(0x0000ffffu)", "with mask 0000ffff, which lacks its own lane"),
    ("warp_operations", "OTHERS_MASK", "__syncwarp(thread % 32", "in __syncwarp at .*, with masks"),
    ("warp_operations", "LOCAL_ARRAY", "copies[i] = ", "takes element 4 of a shorter array"),
    ("warp_operations", "TRAP", "__trap()", r"trap: block \(0,0,0\) thread \(9,0,0\) stops the kernel"),
]  # fmt: skip


def lines_of(kernel, text):
    """file:line of every line of the kernel that holds the text."""
    lines = (KERNELS / f"{kernel}.cu").read_text().splitlines()
    return [f"{kernel}.cu:{number}" for number, line in enumerate(lines, 1) if text in line]


@pytest.mark.parametrize(
    ("kernel", "fault", "line", "message"), FAULTS, ids=lambda x: x if x.isupper() else None
)
def test_planted_faults_are_found(kernel, fault, line, message, monkeypatch):
    monkeypatch.setenv("PYPAR_FAULT", fault)
    module = kernel_module("checked")
    with pytest.raises(RuntimeError, match=message) as raised:
        RUNS[kernel](module)
    text = str(raised.value)
    assert any(
        f"{place}:" in f"{text}:".replace(",", ":").replace(" ", ":") for place in lines_of(kernel, line)
    ), text
    assert (
        text.startswith("kernel ")
        and f"{kernel if kernel != 'warp_operations' else 'exchange'}_kernel" in text
    )
    assert "block (" in text and "thread (" in text


def test_a_missing_wait_shows_in_the_numbers_too(monkeypatch):
    """Without the checks, a tile that is used before it has arrived holds NaN."""
    monkeypatch.setenv("PYPAR_FAULT", "MISSING_WAIT")
    with pytest.raises(AssertionError):
        tile_product(kernel_module("fast"))


@pytest.mark.parametrize("fault", ["BARRIER_NOT_REACHED", "DIVERGENT_SHUFFLE"])
def test_divergence_is_found_without_the_checks(fault, monkeypatch):
    monkeypatch.setenv("PYPAR_FAULT", fault)
    with pytest.raises(RuntimeError, match=DIVERGENT):
        block_sum(kernel_module("fast"))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix_against_matmul(dtype, flavour):
    module = kernel_module(flavour)
    for M, N, K in ((1, 8, 8), (64, 64, 16), (65, 72, 40), (130, 200, 96)):
        tile_product(module, M, N, K, dtype)


def test_counters():
    module = kernel_module("checked")
    module.reset_counters()
    tile_product(module, 64, 64, 64)
    counters = module.counters()
    assert counters["mma"] == 4 * 4 * 8 and counters["load_matrix"] == 4 * 4 * (1 + 4)
    assert counters["load_matrix_conflicts"] == 0 and counters["blocks"] == 1


def warp_expected(x):
    """Rows of the kernel's `give`, by the definitions of the CUDA programming guide."""
    warps = [x[:32], x[32:]]
    ballots = [sum(1 << i for i, v in enumerate(w) if v > 0) for w in warps]
    rows = []
    for t in range(40):
        w, lane = warps[t // 32], t % 32
        full = (1 << len(w)) - 1
        mine = 0x55555555 if lane % 2 == 0 else 0xAAAAAAAA
        rows.append([
            w[lane ^ 3], w[lane // 8 * 8 + 5], w[lane - 3 if lane >= 3 else lane], w[lane - (lane % 4 > 0)],
            w[lane + (lane % 4 < 3)], w[lane ^ 5], w[lane ^ 1], w[lane ^ 1], ballots[t // 32], 7 in w,
            max(w) < 1000, sum(w), max(w), min(v % 2**32 for v in w),
            ballots[t // 32] & mine if lane % 2 == 0 else w[lane ^ 2], full & mine,
            sum(v > 0 for v in x), min(x) > 0, max(x) > 100,
        ])  # fmt: skip
    return [[(v + 2**31) % 2**32 - 2**31 for v in row] for row in zip(*rows, strict=True)]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shuffles_votes_reductions_and_atomics(flavour):
    module = kernel_module(flavour)
    x = torch.randint(-50, 150, (40,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    values = x.tolist()
    expected = warp_expected(values)
    for order, seed in ORDERS:
        module.set_options(thread_order=order, seed=seed)
        with buffers(module, x=x):
            out = torch.zeros(len(expected) + 1, 40, dtype=torch.int32)
            counts = torch.zeros(6, dtype=torch.int32)
            module.warp_operations(x.data_ptr(), out.data_ptr(), counts.data_ptr(), 0)
        assert out[:-1].tolist() == expected
        assert out[-1].sum() == 1  # one thread won the exchange
        assert counts[:5].tolist() == [sum(values), max(values), min(0, *values), 1, -1]
        assert counts[5:].view(torch.float32).item() == 20.0
    module.set_options()


def test_coordinates():
    module = kernel_module("checked")
    with buffers(module):
        out = torch.full((4, 3, 2, 2, 3, 5), -1, dtype=torch.int32)
        module.coordinates(out.data_ptr(), 0)
    z, y, _, thread_z, thread_y, _ = torch.meshgrid(*(torch.arange(n) for n in out.shape), indexing="ij")
    assert torch.equal(out.long(), 1000 * y + 100 * z + 10 * thread_y + thread_z)


def test_conversions_round_as_torch_does():
    module = kernel_module("fast")
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = torch.cat([bits.view(torch.float32), torch.randn(50_000) * 1e-5, torch.randn(50_000), halves])
    x = torch.cat(
        [x, torch.tensor([0.0, -0.0, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 6e-8, torch.inf])]
    )
    bf16, f16 = torch.zeros(2, len(x), dtype=torch.int32)
    back = torch.zeros(len(x))
    module.conversions(x.data_ptr(), bf16.data_ptr(), f16.data_ptr(), back.data_ptr(), len(x), 0)
    finite = ~x.isnan()
    for packed, dtype in ((bf16, torch.bfloat16), (f16, torch.float16)):
        pairs = packed.view(torch.int16).view(-1, 2)
        for half, sign in ((0, 1), (1, -1)):
            assert torch.equal(pairs[finite, half], (sign * x).to(dtype).view(torch.int16)[finite])
        assert pairs[~finite].view(dtype).isnan().all()
    assert torch.equal(back[finite], x.half().float()[finite]) and back[~finite].isnan().all()


def test_streams_are_queues():
    module = kernel_module("fast")
    a, b, c = torch.ones(10), torch.ones(10), torch.zeros(10)
    stream = module.create_stream()
    module.vector_add(a.data_ptr(), b.data_ptr(), c.data_ptr(), 10, stream)
    module.vector_add(c.data_ptr(), c.data_ptr(), a.data_ptr(), 10, stream)
    assert c.sum() == 0
    module.synchronize(stream)
    assert (c == 2).all() and (a == 4).all()
    module.vector_add(a.data_ptr(), a.data_ptr(), c.data_ptr(), 10, stream)
    module.destroy_stream(stream)
    assert (c == 8).all()
