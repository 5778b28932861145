"""The angles of rope: inverse frequencies of each kind of scaling, and their cosines and sines by position.

Parameters are named as in a Hugging Face config's `rope_parameters` (transformers before 5: `rope_scaling`, beside
which `rope_theta` stands). Every number is what transformers 5.23 computes, in its order of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pypar.ops.backend import unknown_name

Frequencies = tuple[Tensor, float]
Parameters = Mapping[str, Any]


def rope_tables(
    parameters: Parameters,
    head_size: int,
    positions: int | Tensor,
    *,
    length: int | None = None,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions, fp32 [..., R/2]: the angles position * frequency, times the attention factor.

    positions: [T] or [B, T], or a number of positions from 0 on. The other arguments are rope_frequencies'; where
    the kind of scaling goes by the sequence's length, that must be said or follow from a number of positions.
    """
    if isinstance(positions, int):
        length = positions if length is None else length
        positions = torch.arange(positions, device=device)
    frequencies, factor = rope_frequencies(
        parameters,
        head_size,
        length=length,
        max_position_embeddings=max_position_embeddings,
        device=positions.device,
    )
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rope_frequencies(
    parameters: Parameters,
    head_size: int,
    *,
    length: int | None = None,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> Frequencies:
    """(inverse frequencies [R/2] in fp32, attention factor that cos and sin are multiplied with).

    R = head_size * partial_rotary_factor (1.0). rope_type is
      "default"      (also where it is left out) theta^(-2i/R), arXiv 2104.09864
      "linear"       those / factor (Chen et al., arXiv 2306.15595)
      "dynamic"      NTK: theta grows with `length` beyond max_position_embeddings, by factor
      "yarn"         arXiv 2309.00071: high frequencies stay, low ones / factor, between beta_fast and beta_slow
      "llama3"       Llama 3.1's: low_freq_factor, high_freq_factor, original_max_position_embeddings
      "longrope"     arXiv 2402.13753: a factor for each frequency, long_factor where `length` is beyond
                     original_max_position_embeddings, else short_factor
      "proportional" Gemma 4's: frequencies beyond R/2 are 0, and there are head_size/2 of them
    length: of the longest sequence; None: max_position_embeddings for "dynamic", a short one for "longrope".
    ValueError: parameters that are missing, an unknown rope_type.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _KINDS:
        raise ValueError(unknown_name("rope_type", str(kind), _KINDS))
    given = _Given(parameters, str(kind), head_size, length, max_position_embeddings, device)
    return _KINDS[kind](given)


class _Given:
    """The arguments of rope_frequencies, of which what is needed must be there."""

    def __init__(
        self,
        parameters: Parameters,
        kind: str,
        head_size: int,
        length: int | None,
        max_position_embeddings: int | None,
        device: torch.device | str | None,
    ) -> None:
        self.parameters, self.kind, self.head_size = parameters, kind, head_size
        self.length, self._max_positions, self.device = length, max_position_embeddings, device
        self.rotary = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        self.theta = self("rope_theta")

    def __call__(self, name: str) -> Any:
        """The parameter of this name, which must be there."""
        if self.parameters.get(name) is None:
            raise ValueError(
                f"rope_type {self.kind!r} needs {name!r}, which the parameters {dict(self.parameters)} lack; add it"
            )
        return self.parameters[name]

    @property
    def max_positions(self) -> int:
        if self._max_positions is None:
            raise ValueError(
                f"rope_type {self.kind!r} needs max_position_embeddings; pass the model's, as its config says it"
            )
        return self._max_positions

    @property
    def original_max_positions(self) -> int:
        return int(self("original_max_position_embeddings"))

    def factor(self) -> float:
        """ "factor", or by how much the model's positions exceed those of its first training."""
        found = self.parameters.get("factor")
        return self.max_positions / self.original_max_positions if found is None else found

    def exponents(self, count: int | None = None, size: int | None = None) -> Tensor:
        """2i / size for i below count / 2; both are R where they are left out."""
        steps = torch.arange(0, self.rotary if count is None else count, 2, device=self.device)
        return steps.float() / (size or self.rotary)


def _default(given: _Given) -> Frequencies:
    return 1.0 / given.theta ** given.exponents(), 1.0


def _linear(given: _Given) -> Frequencies:
    return _default(given)[0] / given("factor"), 1.0


def _dynamic(given: _Given) -> Frequencies:
    factor, longest, R = given("factor"), given.max_positions, given.rotary
    length = max(given.length or longest, longest)
    theta = given.theta * ((factor * length / longest) - (factor - 1)) ** (R / (R - 2))
    return 1.0 / theta ** given.exponents(), 1.0


def _proportional(given: _Given) -> Frequencies:
    H = given.head_size
    angles = int(given.parameters.get("partial_rotary_factor", 1.0) * H // 2)
    turning = 1.0 / given.theta ** given.exponents(2 * angles, H)
    still = torch.zeros(H // 2 - angles, device=given.device)
    return torch.cat((turning, still)) / given.parameters.get("factor", 1.0), 1.0


def _yarn(given: _Given) -> Frequencies:
    parameters, R, factor = given.parameters, given.rotary, given.factor()
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = _mscale(factor, 1)
        if mscale and all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)

    def pair_of(rotations: float) -> float:
        """Which pair turns so often within the positions of the first training."""
        turns = given.original_max_positions / (rotations * 2 * math.pi)
        return (R * math.log(turns)) / (2 * math.log(given.theta))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(R // 2, dtype=torch.float32, device=given.device)
    kept = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    powers = given.theta ** given.exponents()
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention_factor)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: _Given) -> Frequencies:
    original, factor = given.original_max_positions, given.factor()
    attention_factor = given.parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    name = "long_factor" if given.length and given.length > original else "short_factor"
    factors = torch.tensor(given(name), dtype=torch.float32, device=given.device)
    if len(factors) != given.rotary // 2:
        raise ValueError(f"{name} has {len(factors)} numbers and must have R/2 = {given.rotary // 2}")
    return 1.0 / (factors * given.theta ** given.exponents()), float(attention_factor)


def _llama3(given: _Given) -> Frequencies:
    frequencies, _ = _default(given)
    factor, low, high = given("factor"), given("low_freq_factor"), given("high_freq_factor")
    original = given.original_max_positions
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(is_between, between, scaled), 1.0


_KINDS: dict[str, Callable[[_Given], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
