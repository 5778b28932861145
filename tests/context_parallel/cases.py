"""Calls of context-parallel attention for all methods' tests: inputs, one device's results, and the same over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pypar
from pypar.context_parallel import ring_attention
from pypar.context_parallel.layouts import positions_of
from pypar.mesh import Axis
from tests.harness.simulated_ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """Sizes and options. bias: its dims as in "BNTS", 1 where it broadcasts. S None: as T. documents: their ends."""

    B: int = 1
    T: int = 37
    S: int | None = None
    N: int = 4
    G: int = 2
    H: int = 8
    Hv: int = 8
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""  # "N" or "BN"
    bias: str = ""
    dropout_p: float = 0.0
    documents: tuple[int, ...] | None = None
    documents_k: tuple[int, ...] | None = None

    @property
    def length_k(self) -> int:
        return self.T if self.S is None else self.S


DOCUMENTS = (0, 3, 3, 14, 15, 29, 37)  # one is empty, one has one position

CASES = {
    "causal": Case(B=2),
    "full": Case(causal=False),
    "window": Case(T=50, window=(7, 0)),
    "window of both sides": Case(T=50, window=(5, 3), causal=False),
    "window right only": Case(causal=False, window=(None, 4)),
    "own position only": Case(window=(0, 0)),
    "one head": Case(N=1, G=1, H=5, Hv=3),
    "multi-query, Hv": Case(N=6, G=1, H=8, Hv=13),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True, B=2),
    "alibi": Case(alibi="N"),
    "alibi of each sequence": Case(alibi="BN", B=2),
    "bias": Case(bias="BNTS", B=2),
    "bias that broadcasts": Case(bias="11TS", causal=False),
    "bias of keys": Case(bias="S", B=2),
    "dropout": Case(dropout_p=0.3, B=2),
    "short": Case(T=5),
    "one position": Case(T=1),
    "no position": Case(T=0),
    "more keys": Case(T=20, S=37),
    "more queries": Case(T=37, S=20),
    "few keys, full": Case(T=30, S=3, causal=False),
    "documents": Case(documents=DOCUMENTS),
    "documents, full": Case(documents=DOCUMENTS, causal=False),
    "documents, window": Case(documents=(0, 30, 41, 60), T=60, window=(6, 0)),
    "documents, cross": Case(documents=DOCUMENTS, documents_k=(0, 5, 9, 9, 17, 20, 26), S=26),
    "documents, everything": Case(
        documents=DOCUMENTS, window=(9, 0), softcap=3.0, sinks=True, alibi="BN", dropout_p=0.2
    ),
    "everything": Case(
        B=2, window=(20, 0), softcap=3.0, sinks=True, alibi="BN", bias="1NTS", dropout_p=0.2, Hv=6
    ),
}
LEAVES = ("q", "k", "v", "sinks", "bias")


def inputs(case: Case, dtype: torch.dtype, seed: int = 3) -> dict[str, Tensor]:
    """q, k, v, sinks, slopes, bias and the gradients dout and dlse; what the case does not have is missing."""
    generator = torch.Generator().manual_seed(seed)
    batch = () if case.documents else (case.B,)
    S = case.length_k
    num_sequences = len(case.documents) - 1 if case.documents else case.B
    sizes: dict[str, tuple[int, ...]] = {
        "q": (*batch, case.T, case.N, case.H),
        "k": (*batch, S, case.G, case.H),
        "v": (*batch, S, case.G, case.Hv),
        "dout": (*batch, case.T, case.N, case.Hv),
        "dlse": (*batch, case.N, case.T),
    }
    if case.sinks:
        sizes["sinks"] = (case.N,)
    if case.alibi:
        sizes["alibi_slopes"] = {"N": (case.N,), "BN": (num_sequences, case.N)}[case.alibi]
    if case.bias:
        letters = {"B": case.B, "N": case.N, "T": case.T, "S": S, "1": 1}
        sizes["bias"] = tuple(letters[letter] for letter in case.bias)
    made = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
    }
    if "alibi_slopes" in made:
        made["alibi_slopes"] = made["alibi_slopes"].abs().float() * 0.1
    if dtype != torch.float64:
        made["dlse"] = made["dlse"].float()
    return made


def options(case: Case) -> dict[str, Any]:
    """What one device and many ranks are called with alike."""
    return {
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "dropout_p": case.dropout_p,
        "dropout_seed": 1234567 if case.dropout_p else None,
    }


def _ends(documents: tuple[int, ...] | None) -> Tensor | None:
    return None if documents is None else torch.tensor(documents, dtype=torch.int32)


def one_device(case: Case, given: dict[str, Tensor], backend: str | None = "reference") -> dict[str, Tensor]:
    """out, lse and the gradients of one device that has everything."""
    tensors = {
        name: x.detach().clone().requires_grad_(name in LEAVES)
        for name, x in given.items()
        if name not in ("dout", "dlse")
    }
    ends_q = _ends(case.documents)
    ends_k = ends_q if case.documents_k is None else _ends(case.documents_k)
    out, lse = pypar.attention(
        **tensors,
        **options(case),
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
        return_lse=True,
        backend=backend,
    )
    return {"out": out.detach(), "lse": lse.detach()} | _gradients(tensors, out, lse, given)


def _gradients(tensors: dict, out: Tensor, lse: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = [name for name in LEAVES if name in tensors]
    # A row that sees nothing has lse -inf on every device; its gradient has no meaning.
    dlse = given["dlse"].to(lse.dtype).masked_fill(lse.isinf(), 0.0)
    gradients = torch.autograd.grad((out, lse), [tensors[name] for name in leaves], (given["dout"], dlse))
    return {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def on_rank(
    axis: Axis, case: Case, given: dict[str, Tensor], layout: str, call: dict[str, Any], backward: bool = True
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """This rank's out, lse and gradients, and the bytes that it sent forward and backward."""
    held_q = positions_of(case.T, axis.rank, axis.size, layout)
    held_k = positions_of(case.length_k, axis.rank, axis.size, layout)
    held = {"q": held_q, "dout": held_q, "k": held_k, "v": held_k}
    part = {name: x.index_select(-3, held[name]) if name in held else x for name, x in given.items()}
    part["dlse"] = part["dlse"].index_select(-1, held_q)
    if case.bias[-2:-1] == "T":
        part["bias"] = part["bias"].index_select(-2, held_q)
    tensors = {
        name: x.detach().clone().requires_grad_(name in LEAVES)
        for name, x in part.items()
        if name not in ("dout", "dlse")
    }
    q, k, v = (tensors.pop(name) for name in ("q", "k", "v"))
    lengths = {} if case.documents else {"length_q": case.T, "length_k": case.length_k}
    sent_before = axis.traffic.bytes_sent
    out, lse = ring_attention(
        q,
        k,
        v,
        axis,
        layout=layout,
        cu_seqlens=_ends(case.documents),
        cu_seqlens_k=_ends(case.documents_k),
        return_lse=True,
        **(tensors | lengths | options(case) | call),
    )
    sent_forward = axis.traffic.bytes_sent - sent_before
    results = {"out": out.detach(), "lse": lse.detach()}
    if backward:
        results |= _gradients(tensors | {"q": q, "k": k, "v": v}, out, lse, part)
    return results, (sent_forward, axis.traffic.bytes_sent - sent_before - sent_forward)


def together(case: Case, layout: str, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole from all ranks' results: rows put in place, shares of sinks and bias summed."""
    size = len(parts)
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "dsinks" or (name == "dbias" and case.bias[-2:-1] != "T"):
            joined[name] = torch.stack(values).sum(0)
            continue
        dim = {"lse": -1, "dbias": -2}.get(name, -3)
        length = case.length_k if name in ("dk", "dv") else case.T
        place = torch.cat([positions_of(length, rank, size, layout) for rank in range(size)])
        joined[name] = torch.cat(values, dim).index_select(dim, place.argsort())
    return joined


def many_ranks(
    case: Case, given: dict[str, Tensor], size: int, layout: str, *, backward: bool = True, **call: Any
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """The whole's results from simulated ranks, and the bytes that each rank sent forward and backward."""
    outcome = run_ranks(size, on_rank, case, given, layout, call, backward)
    return together(case, layout, [results for results, _ in outcome]), [sent for _, sent in outcome]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], out: float, gradient: float) -> None:
    """The largest error beside the largest value; infinite where and as it should be."""
    assert actual.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = actual[name]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (name, ours.shape, ours.dtype)
        finite = theirs.isfinite()
        assert torch.equal(ours[~finite], theirs[~finite]), f"{name} is not infinite where it must be"
        if not finite.any():
            continue
        error = (ours[finite].double() - theirs[finite].double()).abs().max()
        largest = theirs[finite].double().abs().max()
        allowed = (out if name in ("out", "lse") else gradient) * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
