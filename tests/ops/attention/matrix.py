"""Cases of attention for every backend; judge.run judges a backend by one.

FlashAttention's own test matrix (head sizes, lengths, masks, grouped heads, softcap, ALiBi, dropout) and what it
lacks: sinks, a bias, value heads of another size, sequences of several lengths, fp32.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (1023, 1024)]
_SQUARE = [(512, 256), (1024, 1024), (1024, 1023), (2048, 2048)]
_CAUSAL = [(1, 239), (3, 799), (127, 512), (127, 513)]
LENGTHS = [*_PAIRS, *_SQUARE, *_CAUSAL, *((s, t) for t, s in _PAIRS + _CAUSAL if (s, t) not in _SQUARE)]
# Of each kind one that several blocks of queries and of keys hold, with a rest.
MIDDLE_LENGTHS = [(113, 203), (217, 128), (108, 256), (127, 513), (3, 799), (1, 239)]
SHORT_LENGTHS = [(1, 239), (113, 203), (203, 113), (64, 64), (17, 1), (97, 130)]

# Every axis and its values; the first one is the plainest.
AXES: dict[str, tuple] = {
    "lengths": tuple(LENGTHS),
    "H": (64, 32, 40, 59, 96, 111, 128, 160, 192, 224, 256),
    "heads": ("mha", "gqa", "mqa"),
    "dtype": ("fp32", "bf16", "fp16"),
    "mask": ("full", "causal", "local", "left", "right", "causal-local"),
    "softcap": (0.0, 50.0, 3.0),
    "alibi": ("none", "heads", "batch"),
    "dropout_p": (0.0, 0.17),
    "sinks": (False, True),
    "bias": ("none", "full", "keys", "rows", "heads"),
    "values": ("same", "other"),
    "varlen": (False, True),
}
# Pairs of values of these axes all occur in a sample; of lengths and head sizes every value does, and with these.
FEATURES = ("heads", "dtype", "mask", "softcap", "alibi", "dropout_p", "sinks", "bias", "values", "varlen")
ALSO_PAIRED = {("H", "dtype"), ("H", "mask"), ("lengths", "mask")}

HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
# One batch element and fewer heads above this many scores: the yardstick's memory would cost more than its time.
MANY_SCORES, FEWER_HEADS = 300_000, {"mha": (1, 1), "gqa": (2, 1), "mqa": (1, 1)}
OTHER_VALUES = {
    32: 64,
    40: 24,
    59: 256,
    64: 128,
    96: 128,
    111: 32,
    128: 64,
    160: 128,
    192: 128,
    224: 96,
    256: 40,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WINDOWS = {"local": (5, 9), "left": (6, None), "right": (None, 8), "causal-local": (4, None)}
DROPOUT_SEED = 0x1234_5678_9ABC_DEF


@dataclass(frozen=True)
class Case:
    """One value of each of AXES."""

    lengths: tuple[int, int]
    H: int
    heads: str
    dtype: str
    mask: str
    softcap: float
    alibi: str
    dropout_p: float
    sinks: bool
    bias: str
    values: str
    varlen: bool

    def __str__(self) -> str:
        T, S = self.lengths
        words = [f"{T}x{S}", f"H{self.H}", self.heads, self.dtype, self.mask]
        words += [f"cap{self.softcap:g}"] if self.softcap else []
        words += [f"{name}-{x}" for name in ("alibi", "bias") if (x := getattr(self, name)) != "none"]
        words += ["dropout"] if self.dropout_p else []
        words += [f"Hv{OTHER_VALUES[self.H]}"] if self.values == "other" else []
        return "-".join([*words, *(name for name in ("sinks", "varlen") if getattr(self, name))])


def whole() -> Iterator[Case]:
    """Every head size with every length, mask and dtype; the other axes by turns, as a hash of the case says."""
    base = ("H", "lengths", "mask", "dtype")
    for values in itertools.product(*(AXES[axis] for axis in base)):
        chosen = random.Random(zlib.crc32(repr(values).encode()))
        case = _draw(chosen, dict(zip(base, values, strict=True)), AXES)
        yield case


def sample(axes: dict[str, tuple] = AXES, count: int = 0, seed: int = 0) -> list[Case]:
    """At least `count` cases in which every value occurs and every pair of FEATURES and of ALSO_PAIRED."""
    return list(_sample(tuple(axes.items()), count, seed))


@functools.cache  # several test files draw the same ones
def _sample(of_axes: tuple, count: int, seed: int) -> list[Case]:
    axes, chosen = dict(of_axes), random.Random(seed)
    pairs = {
        pair
        for a, b in itertools.combinations(axes, 2)
        if (a in FEATURES and b in FEATURES) or (a, b) in ALSO_PAIRED or (b, a) in ALSO_PAIRED
        for pair in itertools.product(((a, x) for x in axes[a]), ((b, x) for x in axes[b]))
        if not _excluded(dict(pair))
    }
    missing = dict.fromkeys(sorted(pairs, key=repr))  # a set's order is not the same in every process
    cases: list[Case] = []
    while missing or len(cases) < count:
        tries = [_draw(chosen, dict(next(iter(missing))) if missing else {}, axes) for _ in range(30)]
        best = max(tries, key=lambda case: len(_pairs(case, axes) & missing.keys()))
        for pair in _pairs(best, axes):
            missing.pop(pair, None)
        cases.append(best)
    return cases


def _excluded(values: dict) -> bool:
    return bool(values.get("varlen")) and values.get("bias", "none") != "none"


def _draw(chosen: random.Random, fixed: dict, axes: dict[str, tuple]) -> Case:
    values = {
        axis: fixed.get(axis, choices[chosen.randrange(len(choices))]) for axis, choices in axes.items()
    }
    if _excluded(values):
        values["bias" if "varlen" in fixed else "varlen"] = "none" if "varlen" in fixed else False
    if values["lengths"][1] == 1 and not values["sinks"]:
        # One key and no sink: p is 1 and dq zero, in plain attention without any error to be measured by. With a
        # sink there is one; test_one_key looks at the rest.
        values |= {"lengths": axes["lengths"][0]} if "sinks" in fixed else {"sinks": True}
    return Case(**values)


def _pairs(case: Case, axes: dict[str, tuple]) -> set:
    return set(itertools.combinations([(axis, getattr(case, axis)) for axis in axes], 2))


# ---- operands


def operands(case: Case, turn: int = 0) -> tuple[dict[str, Tensor], dict]:
    """(tensors, other keywords) of attention for a case. The floating point ones require gradients, the slopes not."""
    T, S = case.lengths
    N, G = (FEWER_HEADS if T * S > MANY_SCORES else HEADS)[case.heads] if T * S < 2**22 else (1, 1)
    B = 1 if case.varlen or T * S > MANY_SCORES else 2
    H, Hv = case.H, case.H if case.values == "same" else OTHER_VALUES[case.H]
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()) + turn)

    def draw(*shape: int) -> Tensor:
        # What bf16 holds, so that no dtype begins with an error.
        return torch.randn(shape, generator=generator).bfloat16().float()

    # A cap far above the scores would not be seen. In fp32 they stay smaller: p = exp(x - lse) loses half a unit of
    # lse's last place, whatever computes it, and plain attention's softmax, one dominating score given, nothing.
    q = draw(B, T, N, H) * (1.0 if case.softcap < 50 else 2.5 if dtype == torch.float32 else 10.0)
    tensors = {"q": q.to(dtype), "k": draw(B, S, G, H).to(dtype), "v": draw(B, S, G, Hv).to(dtype)}
    keywords: dict = {"softcap": case.softcap, "causal": case.mask.startswith("causal")}
    if case.mask in WINDOWS:
        keywords["window"] = tuple(side and S // side + 1 for side in WINDOWS[case.mask])
    if case.dropout_p:
        keywords |= {"dropout_p": case.dropout_p, "dropout_seed": DROPOUT_SEED}
    if case.sinks:
        tensors["sinks"] = draw(N)
    if case.bias != "none":
        tensors["bias"] = _bias(case.bias, (B, N, T, S), draw).to(
            torch.float32 if case.bias == "keys" else dtype
        )
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    if case.varlen:
        tensors = {name: x.detach()[0].requires_grad_() if x.dim() == 4 else x for name, x in tensors.items()}
        keywords |= {"cu_seqlens_q": _ends(T, (3, 0, 2, 5, 0)), "cu_seqlens_k": _ends(S, (2, 3, 0, 4, 0))}
        B = len(keywords["cu_seqlens_q"]) - 1
    if case.alibi != "none":
        tensors["alibi_slopes"] = draw(*((B, N) if case.alibi == "batch" else (N,))).abs() / 4
    return tensors, keywords


def _bias(kind: str, shape: tuple[int, int, int, int], draw) -> Tensor:
    B, N, T, S = shape
    if kind == "keys":  # what hides padding: here also a whole batch element's keys
        bias = draw(B, 1, 1, S)
        bias[..., S // 3 : S // 2] = -torch.inf
        bias[1:] = -torch.inf
        return bias
    if kind == "rows":
        return draw(T, 1)
    if kind == "heads":  # strides of no order
        return draw(S, 1, N).permute(2, 1, 0)
    return draw(B, T, N, S).transpose(1, 2)


def _ends(length: int, shares: tuple[int, ...]) -> Tensor:
    """Cumulative lengths of sequences that share `length` so; the last one takes the rest, before an empty one."""
    lengths = [length * share // sum(shares) for share in shares]
    lengths[-2] += length - sum(lengths)
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
