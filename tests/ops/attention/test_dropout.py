"""Attention's dropout: the generator, and that every part of a computation drops what the whole drops."""

import math

import pytest
import torch

from pypar.ops.attention import attention
from pypar.ops.attention.arguments import Positions, attention_problem
from pypar.ops.attention.reference import dropout_keep, philox
from tests.ops.attention.test_matrix import BY_NAME, device_of

MASK = 0xFFFFFFFF


def philox_by_hand(c0, c1, key):
    """Philox 2x32-10 as the paper has it, in Python's integers."""
    for _ in range(10):
        product = 0xD256D193 * c0
        c0, c1, key = (product >> 32) ^ key ^ c1, product & MASK, (key + 0x9E3779B9) & MASK
    return c0, c1


def dropped_by_hand(seed, p, batch, head, pq, pk):
    stream = philox_by_hand(*philox_by_hand(batch & MASK, head & MASK, seed & MASK), seed >> 32)[0]
    return philox_by_hand(pk & MASK, pq & MASK, stream)[0] < math.floor(p * 2**32)


def test_known_answers():
    """Those that Random123 publishes for philox2x32-10."""
    known = {
        (0, 0, 0): (0xFF1DAE59, 0x6CD10DF2),
        (MASK, MASK, MASK): (0x2C3F628B, 0xAB4FD7AD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E): (0xDD7CE038, 0xF62A4C12),
    }
    for arguments, answer in known.items():
        assert philox_by_hand(*arguments) == answer
        assert tuple(int(x) for x in philox(*(torch.tensor(x) for x in arguments))) == answer


@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, 0x1234_5678_9ABC_DEF0, 2**63 - 1])
def test_mask_by_hand(seed):
    batch, head, pq, pk = (0, 3), (0, 17), (-5, 0, 2**31), (-1, 0, 7, 2**20)
    grids = torch.meshgrid(*(torch.tensor(x) for x in (batch, head, pq, pk)), indexing="ij")
    keep = dropout_keep(seed, 0.37, *grids)
    for i, b in enumerate(batch):
        for j, n in enumerate(head):
            for t, q in enumerate(pq):
                for s, k in enumerate(pk):
                    assert keep[i, j, t, s] != dropped_by_hand(seed, 0.37, b, n, q, k)


def mask(seed, p=0.5, shape=(4, 4, 256, 256)):
    indices = [torch.arange(n).reshape([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(shape)]
    return dropout_keep(seed, p, *indices)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.17, 0.5, 0.9, 0.999])
def test_fraction_kept(p):
    """Within 5 standard deviations: as a whole, in every batch element and head, in every row, in every column."""
    keep = mask(11, p).double()
    for dims in ((0, 1, 2, 3), (2, 3), (3,), (2,)):
        count = math.prod(keep.shape[d] for d in dims)
        deviation = 5 * math.sqrt(p * (1 - p) / count)
        found = keep.mean(dims)
        # Tails of the binomial distribution are longer than the normal's where few are dropped or kept.
        assert ((found - (1 - p)).abs() <= deviation + 8 / count * (p not in (0.0, 0.5))).all(), dims


@pytest.mark.parametrize(
    "other", [(0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 7, 3)]
)
def test_neighbours_are_independent(other):
    """Also batch elements, heads, and keys and queries that change places; and the next seed's."""
    keep = mask(12, shape=(3, 3, 128, 128)).double() - 0.5
    here = keep[tuple(slice(0, n - d) for n, d in zip(keep.shape, other, strict=True))]
    there = keep[tuple(slice(d, None) for d in other)]
    assert abs((4 * here * there).mean()) < 5 / math.sqrt(here.numel())
    assert abs((4 * keep * keep.mT)[..., torch.ones(128, 128).triu(1).bool()].mean()) < 5 / math.sqrt(
        keep.numel() / 2
    )
    for seed in (13, 12 + 2**32):
        following = mask(seed, shape=(3, 3, 128, 128)).double() - 0.5
        assert abs((4 * keep * following).mean()) < 5 / math.sqrt(keep.numel())


def test_runs_have_the_lengths_of_chance():
    """Chi-squared of 8 keys in a row as a number of 8 bits, along keys and along queries."""
    keep = mask(14, shape=(2, 2, 512, 512))
    for bits in (keep, keep.mT):
        words = (bits.reshape(-1, 8).long() << torch.arange(8)).sum(-1)
        expected = words.numel() / 256
        chi_squared = ((torch.bincount(words, minlength=256) - expected) ** 2 / expected).sum()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


# ---- every backend drops these, whatever part of the whole it computes


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


B, T, S, N, G, H = 2, 70, 90, 4, 2, 16
KEYWORDS = {"dropout_p": 0.3, "dropout_seed": 77, "causal": True}


@pytest.fixture(params=BY_NAME)
def backend(request):
    if device_of(request.param) != "cpu":
        pytest.skip(f"{request.param} does not run on the CPU")
    return BY_NAME[request.param]


def dropped_of(backend, problem):
    """[B, N, T, S]: the probabilities after dropout, by values that form an identity, as out gives them."""
    return backend.forward(problem, None)[0].transpose(1, 2)


def whole_and(backend, shape_of_q, shape_of_k, **positions):
    """Attention whose out are its probabilities (Hv = S) over B, N, T, S and over a part of it."""
    q, k = draw(B, T, N, H), draw(B, S, G, H)
    v = torch.eye(S)[None, :, None].expand(B, S, G, S)
    (b, t, n), (s, g) = shape_of_q, shape_of_k
    whole = attention_problem(q, k, v, **KEYWORDS)
    part = attention_problem(q[b, t, n], k[b, s, g], v[b, s, g], **KEYWORDS, positions=Positions(**positions))
    return dropped_of(backend, whole)[b, n, t], dropped_of(backend, part)


ALL = slice(None)
PARTS = {
    "half the batch": (((slice(1, 2), ALL, ALL), (ALL, ALL)), {"q_start": S - T, "batch_start": 1}),
    "half the heads": (((ALL, ALL, slice(2, 4)), (ALL, slice(1, 2))), {"q_start": S - T, "head_start": 2}),
    "later queries": (((ALL, slice(33, T), ALL), (ALL, ALL)), {"q_start": S - T + 33}),
    "every second query and key": (
        ((ALL, slice(1, T, 2), ALL), (slice(0, S, 2), ALL)),
        {"q_start": 21, "step": 2},
    ),
    "later keys": (((ALL, ALL, ALL), (slice(41, S), ALL)), {"q_start": S - T, "k_start": 41}),
    "elsewhere altogether": (((ALL, ALL, ALL), (ALL, ALL)), {"q_start": 1000 + S - T, "k_start": 1000}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_drops_what_the_whole_drops(backend, part):
    shapes, positions = PARTS[part]
    whole, there = whole_and(backend, *shapes, **positions)
    keys = shapes[1][0]
    if part == "elsewhere altogether":
        assert ((whole == 0) != (there == 0)).any()
    else:
        assert torch.equal(whole[..., keys] == 0, there[..., keys] == 0)


def test_every_backend_drops_what_the_generator_says(backend):
    whole, _ = whole_and(backend, (ALL, ALL, ALL), (ALL, ALL))
    indices = [
        torch.arange(n).reshape([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate((B, N, T, S))
    ]
    indices[2] = indices[2] + S - T
    seen = indices[3] <= indices[2]
    keep = dropout_keep(77, 0.3, *indices) & seen
    assert torch.equal(whole != 0, keep)


def test_few_queries_drop_what_many_drop(backend):
    """Decoding goes another way through the keys."""
    whole, last = whole_and(backend, (ALL, slice(T - 1, T), ALL), (ALL, ALL), q_start=S - 1)
    assert torch.equal(whole == 0, last == 0)


def test_sequences_are_numbered_like_batch_elements(backend):
    q, k, v = draw(B, T, N, H), draw(B, S, G, H), draw(B, S, G, H)
    dense, *_ = backend.forward(attention_problem(q, k, v, **KEYWORDS), None)
    ends = {
        f"cu_seqlens_{n}": torch.tensor([0, x, 2 * x], dtype=torch.int32) for n, x in (("q", T), ("k", S))
    }
    flat = attention_problem(*(x.flatten(0, 1) for x in (q, k, v)), **KEYWORDS, **ends)
    torch.testing.assert_close(backend.forward(flat, None)[0], dense.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_the_seed_decides_and_torch_draws_it_when_none_is_given():
    q = draw(1, 40, 2, 16)
    ask = {"dropout_p": 0.5, "backend": "native"}
    assert torch.equal(attention(q, q, q, dropout_seed=3, **ask), attention(q, q, q, dropout_seed=3, **ask))
    assert torch.equal(
        attention(q, q, q, dropout_seed=3, **ask), attention(q, q, q, dropout_seed=torch.tensor([3]), **ask)
    )
    assert not torch.equal(
        attention(q, q, q, dropout_seed=3, **ask), attention(q, q, q, dropout_seed=4, **ask)
    )
    torch.manual_seed(5)
    first, second = attention(q, q, q, **ask), attention(q, q, q, **ask)
    torch.manual_seed(5)
    assert torch.equal(attention(q, q, q, **ask), first) and not torch.equal(first, second)


def test_a_negative_seed_is_the_number_of_its_bits():
    q = draw(1, 40, 2, 16)
    ask = {"dropout_p": 0.5, "dropout_seed": torch.tensor([-(2**40) - 5])}
    native, reference = (attention(q, q, q, **ask, backend=name) for name in ("native", "reference"))
    torch.testing.assert_close(native, reference)
