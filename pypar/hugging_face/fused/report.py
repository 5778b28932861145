"""What `pypar.apply_fused` did to a model, for a person to read."""

from __future__ import annotations

from dataclasses import dataclass

from pypar.parallel.regions import listed


@dataclass(frozen=True)
class Line:
    """Modules of one class that share a fate.

    part: what they are, such as "norm"; class_name: their class; names: theirs in the model; text: the operator that
    they run now, or why they are left.
    """

    part: str
    class_name: str
    names: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{len(self.names):4} x {self.part} of {self.class_name} ({listed(list(self.names)) or 'the model'})"


@dataclass(frozen=True)
class FusedReport:
    """swapped: what runs pypar's operators now; left: what does not, and why; before: what did already.

    `str` of it is a table with a line for each class of modules.
    """

    model: str
    swapped: tuple[Line, ...]
    left: tuple[Line, ...]
    before: tuple[Line, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model}: what pypar.apply_fused found"]
        lines += [f"{line} -> {line.text}" for line in self.swapped]
        lines += [f"{line} -> {line.text}, since an earlier call" for line in self.before]
        lines += [f"{line} left: {line.text}" for line in self.left]
        return "\n".join(lines)
