"""Counts what one mesh axis sends and how long this rank is blocked waiting for it."""

from collections import Counter
from typing import NamedTuple

_FULL_SIZE_PASSES = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
}


def wire_bytes(collective: str, full_bytes: int, world_size: int) -> int:
    """Bytes that each rank sends for one collective (rounded down), by the bandwidth-optimal ring algorithms.

    full_bytes is the size of the whole tensor: the reduced one for all_reduce, the gathered one for
    all_gather, the input for reduce_scatter and all_to_all. all_reduce costs 2(R-1)/R of it, the others
    (R-1)/R. (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
    2009.)
    """
    return _FULL_SIZE_PASSES[collective] * (world_size - 1) * full_bytes // world_size


class Call(NamedTuple):
    """The latest communication that an axis started."""

    collective: str
    sequence: int  # 1 for the first call on the axis since it was made, never reset
    num_bytes: int  # bytes that this rank sends for it

    def __str__(self) -> str:
        return f"{self.collective} (call {self.sequence}, {self.num_bytes} bytes to send)"


class TrafficSnapshot(NamedTuple):
    """The counters at one moment."""

    bytes_sent: int
    calls: dict[str, int]
    wait_seconds: float


class Traffic:
    """Counters of one axis on this rank.

    bytes_sent    bytes that this rank put on the wire: `wire_bytes` of collectives, the size of sent tensors
    calls         how often each collective was started
    wait_seconds  seconds that this rank was blocked in `Handle.wait`
    last          the latest call, None before the first
    """

    __slots__ = ("axis_name", "bytes_sent", "calls", "last", "wait_seconds", "_sequence")

    def __init__(self, axis_name: str = "") -> None:
        self.axis_name = axis_name
        self.last: Call | None = None
        self._sequence = 0
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero; `last` stays."""
        self.bytes_sent = 0
        self.calls: Counter[str] = Counter()
        self.wait_seconds = 0.0

    def record(self, collective: str, num_bytes: int) -> None:
        """Count one started call that makes this rank send num_bytes."""
        self._sequence += 1
        self.bytes_sent += num_bytes
        self.calls[collective] += 1
        self.last = Call(collective, self._sequence, num_bytes)

    def record_wait(self, seconds: float) -> None:
        """Count time spent blocked."""
        self.wait_seconds += seconds

    def snapshot(self) -> TrafficSnapshot:
        """A copy of the counters that later calls do not change."""
        return TrafficSnapshot(self.bytes_sent, dict(self.calls), self.wait_seconds)

    def __repr__(self) -> str:
        return (
            f"Traffic({self.axis_name!r}, bytes_sent={self.bytes_sent}, calls={dict(self.calls)}, "
            f"wait_seconds={self.wait_seconds:.6f}, last={self.last})"
        )
