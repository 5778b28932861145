"""One launch of a kernel: it can be run, compiled for a device that is not there, or run elsewhere."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: what the compiler finds best for many threads

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.max_registers is None else found | {"maxnreg": self.max_registers}

    def run(self) -> None:
        if self.num_programs:
            self.kernel[(self.num_programs,)](**self.arguments, **self.options)
