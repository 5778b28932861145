"""Which library multiplies matrices on this processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pypar.ops.backend import never_refuses
from pypar.ops.linear import onednn
from pypar.ops.linear.library import LinearBackend, linear_backend
from pypar.ops.linear.onednn import ONEDNN
from pypar.ops.linear.upcast import HALVES, UPCAST, has_instructions


@dataclass(frozen=True)
class Processor:
    """What the choice of a library depends on: a vendor such as "AuthenticAMD" ("unknown" where Linux does not say)."""

    vendor: str
    has_avx512: bool


def processor() -> Processor:
    """This machine's, as /proc/cpuinfo describes its first processor."""
    facts = {}
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if not line.strip():  # the end of the first processor
                    break
                name, _, value = line.partition(":")
                facts[name.strip()] = value.strip()
    except OSError:
        pass
    return Processor(facts.get("vendor_id", "unknown"), "avx512f" in facts.get("flags", "").split())


def library_choice(processor: Processor) -> tuple[str, str]:
    """(backend that fp32 on CPU takes first, why)."""
    missing = onednn.missing()
    if missing is not None:
        return "torch", missing
    own = "MKL" if torch.backends.mkl.is_available() else "its own library, for want of MKL,"
    if processor.vendor == "AuthenticAMD" and processor.has_avx512:
        return (
            "onednn",
            f"torch takes {own} for fp32, and oneDNN was the faster on AMD processors with AVX-512",
        )
    with_or_without = "with" if processor.has_avx512 else "without"
    return (
        "torch",
        f"torch takes {own} for fp32, and oneDNN was seen to be faster on AMD processors with AVX-512 only "
        f"(vendor {processor.vendor}, {with_or_without} AVX-512)",
    )


def half_choice(dtype: torch.dtype) -> tuple[str, str]:
    """(backend that bf16 or fp16 on CPU takes first, why)."""
    if has_instructions(dtype):
        return "torch", "torch multiplies it by oneDNN, for which the processor has the instructions"
    return "upcast", "products of fp32 copies, since torch would multiply it by loops of its own"


def torch_weight_gradient(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dout.T @ x over all leading dimensions."""
    return dout.reshape(-1, dout.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


TORCH = linear_backend(
    "torch", torch.nn.functional.linear, torch.matmul, torch_weight_gradient, never_refuses
)


def backends_for(processor: Processor, dtype: torch.dtype) -> tuple[LinearBackend, ...]:
    """The backends, fastest first, for a processor and a dtype."""
    if dtype in HALVES:
        return (UPCAST, ONEDNN, TORCH) if half_choice(dtype)[0] == "upcast" else (TORCH, ONEDNN, UPCAST)
    return (ONEDNN, TORCH, UPCAST) if library_choice(processor)[0] == "onednn" else (TORCH, ONEDNN, UPCAST)
