"""What attention accepts: every refusal is a ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

UNBOUNDED = -1  # a side of a window without a bound
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What kernels hold in fp32. Comparisons, not math.isfinite: torch.compile traces a float that may change.
_SMALLEST, _LARGEST = 1e-30, 1e30
_LARGEST_DROPOUT = 1 - 2**-24  # the last number below 1
_LARGEST_SIDE = 2**62


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__} and must be a torch.Tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{name} is {x.layout} and must be dense; call to_dense()")


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> None:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(
            f"{missing} is missing: sequences of several lengths need cu_seqlens_q and cu_seqlens_k; for "
            "self-attention pass the same tensor twice"
        )
    dims, shape = (4, "[batch, positions, heads, head size]")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_tensor("cu_seqlens_q", cu_seqlens_q)
        check_tensor("cu_seqlens_k", cu_seqlens_k)
        dims, shape = (3, "[positions of all sequences, heads, head size] with cu_seqlens_q")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != dims:
            raise ValueError(f"{name} {tuple(x.shape)} must be {shape}; reshape it")
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {x.dtype}; it must be float32, bfloat16, float16 or float64: convert it"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q is on {q.device}; move them to one device")
    N, H = q.shape[-2:]
    G = k.shape[-2]
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != H or H == 0:
        batch = f"q's batch ({q.shape[0]}) and " if dims == 4 else ""
        raise ValueError(
            f"k {tuple(k.shape)} must have {batch}q's head size ({H}), which must not be 0; "
            f"q is {tuple(q.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] == 0:
        raise ValueError(
            f"v {tuple(v.shape)} must have one vector per key of k {tuple(k.shape)}; "
            f"pass v of shape {(*k.shape[:-1], 'Hv')} with Hv > 0"
        )
    if G == 0 or N == 0 or N % G != 0:
        raise ValueError(
            f"q's number of heads ({N}) must be a positive multiple of k's ({G}): whole groups of query "
            "heads share a key/value head; pass k and v with a number of heads that divides it"
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q describes {cu_seqlens_q.shape[0] - 1} sequences and cu_seqlens_k "
                f"{cu_seqlens_k.shape[0] - 1}; they must describe the same ones"
            )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, of: str, x: Tensor) -> None:
    """Shape and dtype; on the CPU also the values, which on a GPU would make the host wait."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be int32 of shape [sequences + 1]"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"{name} is on {cu_seqlens.device} and {of} is on {x.device}; move them to one device"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or _has_no_values(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0]:
        raise ValueError(
            f"{name} goes from {ends[0]} to {ends[-1]}; it must start at 0 and end at {of}'s number of positions "
            f"({x.shape[0]})"
        )
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(
                f"{name}[{i}] ({ends[i]}) is below {name}[{i - 1}] ({ends[i - 1]}); it must not decrease"
            )


def _has_no_values(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or x.device.type == "meta"


def check_window(window: tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    """(left, right) with causal folded in; UNBOUNDED for None and -1."""
    left, right = UNBOUNDED, UNBOUNDED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window ({window}) must be a pair (left, right); None in it leaves a side open")
        for name, side in zip(("left", "right"), window, strict=True):
            if side is None:
                continue
            if not isinstance(side, int) or isinstance(side, bool) or not UNBOUNDED <= side < _LARGEST_SIDE:
                raise ValueError(
                    f"window's {name} ({side}) must be a whole number of keys, at least 0; "
                    "None (or -1) leaves the side open"
                )
        left = UNBOUNDED if window[0] is None else window[0]
        right = UNBOUNDED if window[1] is None else window[1]
    return left, 0 if causal else right


def check_scores(
    q: Tensor,
    k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    num_sequences: int | None,
) -> None:
    N = q.shape[-2]
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes), ("bias", bias)):
        if x is None:
            continue
        check_tensor(name, x)
        if x.device != q.device or not x.is_floating_point():
            raise ValueError(f"{name} {x.dtype} on {x.device} must be floating point on {q.device}")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"sinks {tuple(sinks.shape)} must have one number per query head: ({N},)")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes requires a gradient and gets none: pass alibi_slopes.detach()")
    if alibi_slopes is not None and alibi_slopes.shape != (N,):
        batch = q.shape[0] if num_sequences is None else num_sequences
        if alibi_slopes.shape != (batch, N):
            raise ValueError(f"alibi_slopes {tuple(alibi_slopes.shape)} must be ({N},) or ({batch}, {N})")
    if bias is None:
        return
    if num_sequences is not None:
        raise ValueError("bias does not combine with cu_seqlens_q; pad the sequences to one length for it")
    scores = (q.shape[0], N, q.shape[1], k.shape[1])
    fits = bias.dim() <= 4 and all(
        b in (1, s) for b, s in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(f"bias {tuple(bias.shape)} must broadcast to [B, N, T, S] = {scores}")
    if bias.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"bias is {bias.dtype}; it must be q's {q.dtype} or torch.float32: convert it")


def check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    scale = _number("scale", scale)
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(
            f"scale ({scale}) must be finite, at most {_LARGEST:.0e}; None gives 1 / sqrt(H), here "
            f"{q.shape[-1] ** -0.5:.4g}"
        )
    return scale


def check_softcap(softcap: float) -> float:
    softcap = _number("softcap", softcap)
    if softcap != 0 and not _SMALLEST <= softcap <= _LARGEST:
        raise ValueError(
            f"softcap ({softcap}) must be finite and not negative; 0 switches it off, else it is from "
            f"{_SMALLEST:.0e} to {_LARGEST:.0e}"
        )
    return softcap


def check_dropout(dropout_p: float) -> float:
    dropout_p = _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= _LARGEST_DROPOUT:
        raise ValueError(
            f"dropout_p ({dropout_p}) must be at least 0 and below 1, at most {_LARGEST_DROPOUT:.8f}"
        )
    return dropout_p


def _number(name: str, x: float) -> float:
    try:
        return float(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name} ({x!r}) must be a number") from None
