"""The native entry points given hostile numbers and types: a ValueError or TypeError, never a crash.

Hundreds of calls, in the long tests tens of thousands, in a process of its own, so that a crash is seen. Every buffer
stands between guards, which a call must not change, whether it refuses or not.
"""

import math
import random
import struct
import subprocess
import sys

import pytest
import torch

from tests import ROOT

GUARD = 4096
B, T, S, N, G, H, HV = 2, 5, 7, 4, 2, 8, 8


class Memory:
    """Buffers with a guard on both sides."""

    def __init__(self):
        self.buffers = []

    def floats(self, count, value=None):
        whole = torch.full((count + 2 * GUARD,), 12345.0)
        inside = whole[GUARD : GUARD + count]
        inside.copy_(torch.randn(count) if value is None else torch.full((count,), value))
        self.buffers.append(whole)
        return inside.data_ptr()

    def integers(self, values):
        kept = torch.tensor(values, dtype=torch.int32)
        self.buffers.append(kept)
        return kept.data_ptr()

    def check(self):
        for whole in self.buffers:
            if whole.dtype == torch.float32:
                assert (whole[:GUARD] == 12345.0).all() and (whole[-GUARD:] == 12345.0).all(), (
                    "a guard was overwritten"
                )


def strides(length, heads, size):
    return length * heads * size, heads * size, size, 1


def sound_problem(memory, chosen):
    """A problem that is right, with most of the options, and the arguments of forward and backward."""
    varlen = chosen.random() < 0.4
    problem = {"B": B, "T": T, "S": S, "N": N, "G": G, "H": H, "Hv": HV}
    lengths = {"q": (T, N, H), "k": (S, G, H), "v": (S, G, HV), "out": (T, N, HV), "dout": (T, N, HV)}
    lengths |= {"dq": lengths["q"], "dk": lengths["k"], "dv": lengths["v"]}
    if varlen:
        problem["T"], problem["S"] = B * T, B * S
    tensors = {}
    for name, shape in lengths.items():
        step = (0, *strides(*shape)[1:]) if varlen else strides(*shape)
        tensors[name] = (memory.floats(B * math.prod(shape)), step, 0)
    problem |= {name: tensors[name] for name in "qkv"}
    problem["cu_seqlens_q"] = memory.integers([0, chosen.randrange(B * T), B * T]) if varlen else 0
    problem["cu_seqlens_k"] = memory.integers([0, chosen.randrange(B * S), B * S]) if varlen else 0
    bias = (
        None
        if varlen or chosen.random() < 0.5
        else (memory.floats(B * N * T * S), (N * T * S, T * S, S, 1), 0)
    )
    dropout = chosen.choice([0.0, 0.4])
    problem |= {
        "scale": 0.3,
        "softcap": chosen.choice([0.0, 2.0]),
        "left": chosen.choice([-1, 0, 3]),
        "right": chosen.choice([-1, 0, 3]),
        "bottom_right": chosen.random() < 0.5,
        "q_start": chosen.randrange(9),
        "k_start": chosen.randrange(9),
        "step": chosen.choice([1, 2]),
        "batch_start": 0,
        "head_start": 0,
        "bias": bias,
        "sinks": chosen.choice([0, memory.floats(N)]),
        "alibi_slopes": chosen.choice([0, memory.floats(B * N)]),
        "alibi_batch_stride": chosen.choice([0, N]),
        "dropout_p": dropout,
        "dropout_threshold": math.floor(dropout * 2**32),
        "seed": memory.integers([5, 0]) if dropout else 0,
        "num_threads": chosen.choice([1, 2]),
        "stream": 0,
    }
    lse, dlse = memory.floats(B * N * T, 1.0), chosen.choice([0, memory.floats(B * N * T)])
    dbias = 0 if bias is None else memory.floats(B * N * T * S, 0.0)
    lse_rest = chosen.choice([0, memory.floats(B * N * T, 0.0)])
    forward = [tensors["out"], lse, lse_rest, chosen.random() < 0.3]
    backward = [tensors["dout"], tensors["out"], lse, lse_rest, dlse, *(tensors[f"d{x}"] for x in "qkv"),
                chosen.random() < 0.5, dbias]  # fmt: skip
    return problem, forward, backward


NONSENSE = [None, "7", b"x", [], (), {}, object(), 1.5j, struct]
NOT_SIZES = [-1, -(2**31), 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 2**200, 3.0, math.nan, *NONSENSE]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, 1e39, 10**400, *NONSENSE]
NOT_ADDRESSES = [-1, 2**64, 2**200, 3.5, *NONSENSE]
TOO_LARGE = [2**41, -(2**41), 2**63 - 1, 2**63, 2.0, *NONSENSE]
# Values that must be refused, by field.
HOSTILE = {
    **dict.fromkeys(("B", "T", "S", "N", "G", "H", "Hv"), NOT_SIZES),
    **dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "seed", "stream"), NOT_ADDRESSES
    ),
    **dict.fromkeys(("scale", "softcap"), NOT_NUMBERS),
    "dropout_p": [-0.1, 1.0, 1.5, *NOT_NUMBERS],
    "dropout_threshold": [-1, 2**32, 0.5, *NONSENSE],
    **dict.fromkeys(("left", "right"), [-2, -(2**40), 2**63, 0.5, *NONSENSE]),
    **dict.fromkeys(("q_start", "k_start"), TOO_LARGE),
    "step": [0, -1, *TOO_LARGE],
    **dict.fromkeys(("batch_start", "head_start"), [-1, 2**32, 0.5, *NONSENSE]),
    "alibi_batch_stride": TOO_LARGE,
    "num_threads": [0, -1, 2**31, 2**70, 1.0, *NONSENSE],
}
HOSTILE["G"] = [0, 3, *NOT_SIZES]
HOSTILE["N"] = [0, 3, 5, *NOT_SIZES]
HOSTILE["H"] = HOSTILE["Hv"] = [0, *NOT_SIZES]


def hostile_tensor(tensor, chosen):
    """A tensor's tuple with something wrong in it."""
    address, steps, dtype = tensor
    wrong = chosen.randrange(5)
    if wrong == 0:
        return chosen.choice([0, *NOT_ADDRESSES]), steps, dtype
    if wrong == 1:
        bad = list(steps)
        bad[chosen.randrange(4)] = chosen.choice(TOO_LARGE)
        return address, tuple(bad), dtype
    if wrong == 2:
        return address, chosen.choice([steps[:3], (*steps, 1), list(steps), *NONSENSE]), dtype
    if wrong == 3:
        return address, steps, chosen.choice([-1, 3, 2**31, 2**64, 1.0, *NONSENSE])
    return chosen.choice([(address, steps), (address, steps, dtype, 0), [address, steps, dtype], *NONSENSE])


def spoil(problem, chosen):
    """Makes a sound problem wrong; says how."""
    kind = chosen.randrange(8)
    if kind == 0:
        name = chosen.choice(list(problem))
        del problem[name]
        return f"no {name}"
    if kind == 1:
        name = chosen.choice("qkv")
        problem[name] = hostile_tensor(problem[name], chosen)
        return f"{name} {problem[name]}"
    if kind == 2 and problem["bias"] is not None:
        while (bad := hostile_tensor(problem["bias"], chosen)) is None:  # which is no bias
            pass
        problem["bias"] = bad
        return f"bias {bad}"
    if kind == 3 and problem["cu_seqlens_q"]:
        return spoil_lengths(problem, chosen)
    if kind == 4:
        name = chosen.choice("qkv")
        address, steps, _ = problem[name]
        problem[name] = address, steps, chosen.choice([1, 2])
        return f"{name} of another dtype"
    name = chosen.choice(list(HOSTILE))
    problem[name] = chosen.choice(HOSTILE[name])
    return f"{name} {problem[name]!r}"


LENGTHS = []


def spoil_lengths(problem, chosen):
    name, total = chosen.choice([("q", problem["T"]), ("k", problem["S"])])
    values = chosen.choice(
        [[1, 2, total], [0, total, 3], [0, -1, total], [0, 3, total + 1], [0, 3, 2**31 - 1], [-5, 0, total],
         [0, 2**31 - 1, total], [0, -(2**31), total]]
    )  # fmt: skip
    LENGTHS.append(torch.tensor(values, dtype=torch.int32))
    problem[f"cu_seqlens_{name}"] = LENGTHS[-1].data_ptr()
    return f"cu_seqlens_{name} {values}"


def call(module, which, problem, arguments, memory):
    """A whole call with memory of its own between guards; returns the error."""
    try:
        size = getattr(module, f"attention_{which}_memory")(problem)
        address = memory.floats(size // 4 + 1, 0.0)
        getattr(module, f"attention_{which}")(problem, *arguments, address)
    except (ValueError, TypeError) as error:
        assert str(error)
        return error
    finally:
        memory.check()
    return None


def attack(seed, count):
    """`count` rounds: a sound problem runs, then a wrong one is refused, then wrong arguments."""
    from pypar.ops import native

    module = native.module()
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        memory = Memory()
        problem, forward, backward = sound_problem(memory, chosen)
        which, arguments = chosen.choice([("forward", forward), ("backward", backward)])
        assert (error := call(module, which, problem, arguments, memory)) is None, (problem, error)
        wrong = dict(problem)
        how = spoil(wrong, chosen)
        assert call(module, which, wrong, arguments, memory) is not None, f"{which} took {how}"
        place = chosen.randrange(len(arguments))
        wrong = list(arguments)
        if isinstance(wrong[place], tuple):
            wrong[place] = hostile_tensor(wrong[place], chosen)
        elif isinstance(wrong[place], bool):
            wrong[place] = chosen.choice(["x", [], object()])
        else:
            wrong[place] = chosen.choice(NOT_ADDRESSES)
        refused = call(module, which, problem, wrong, memory)
        assert refused is not None, f"{which} took {wrong[place]!r} for {arguments[place]!r}"
        LENGTHS.clear()


def in_a_process(seed, count):
    program = f"from tests.ops.attention.cpu import test_fuzz; test_fuzz.attack({seed}, {count})"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stderr[-2000:]}"


def test_hostile_problems_are_refused():
    in_a_process(0, 700)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
def test_many_hostile_problems_are_refused(seed):
    in_a_process(seed, 5000)
