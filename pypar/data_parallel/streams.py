"""Order between the streams of a GPU that write, reduce and read a bucket.

Parts of a backward may run on several streams, so a bucket has a set of writers, and waiting for the stream on which
its last gradient arrived is not enough. Everything goes through four calls of a `DeviceStreams`, so that tests
drive this code with streams of their own and check what happens before what.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pypar.data_parallel.flat import Bucket


class DeviceStreams(Protocol):
    """What is asked of devices of one type. None of it blocks the host."""

    device_type: str

    def current(self, device: torch.device) -> Hashable:
        """The stream on which this thread queues its work for the device."""

    def record(self, stream: Any, event: Any | None) -> Any:
        """An event that is over when all that `stream` has queued so far is; `event` is used again if given."""

    def wait(self, stream: Any, event: Any) -> None:
        """What `stream` queues from now on begins when the event is over."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """The tensor's memory, once freed, is not given away before what `stream` has queued by then is over."""


class CudaStreams:
    """CUDA's."""

    device_type = "cuda"

    def current(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def record(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> torch.cuda.Event:
        event = event or torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)


class BucketStreams:
    """Who has written which bucket, and who must wait for it.

    The writers of a bucket are its producers (each gradient that arrived, and whoever zeroed the memory of those
    that did not) and, after `finish()`, the stream that waited for the sum. The stream that starts a
    communication waits for all of them: NCCL's own stream waits for that one alone.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        # Weak: a bucket that is replaced takes its events with it.
        self._events: weakref.WeakKeyDictionary[Bucket, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

    def wrote(self, bucket: Bucket) -> None:
        """The current stream has queued a write into the bucket."""
        if self._has(bucket):
            stream = self._streams.current(bucket.flat.device)
            events = self._events.setdefault(bucket, {})
            events[stream] = self._streams.record(stream, events.get(stream))

    def before_communication(self, bucket: Bucket) -> None:
        """The current stream, which starts the communication, waits for all who wrote."""
        self._wait_for_writers(bucket)

    def after(self, bucket: Bucket) -> None:
        """The current stream has waited for the communication, hence for all who wrote before it, and is from now
        on the only one to wait for.
        """
        self._events.pop(bucket, None)
        self.wrote(bucket)

    @contextlib.contextmanager
    def writing(self, bucket: Bucket) -> Iterator[None]:
        """The current stream overwrites the bucket in here: not before the last sum is there, and not under a
        gradient that is still being written.
        """
        self._wait_for_writers(bucket)
        yield
        self.wrote(bucket)

    def before_release(self, bucket: Bucket) -> None:
        """The bucket's memory is about to be freed: not before the current stream's use of it is over. The
        allocator knows only the stream on which the memory was taken.
        """
        self._wait_for_writers(bucket)
        if self._has(bucket):
            for buffer in (bucket.flat, *(() if bucket.wire is None else (bucket.wire,))):
                self._streams.keep(buffer, self._streams.current(buffer.device))

    def _wait_for_writers(self, bucket: Bucket) -> None:
        if not self._has(bucket):
            return
        current = self._streams.current(bucket.flat.device)
        for stream, event in self._events.get(bucket, {}).items():
            if stream != current:  # a stream's own work is in order
                self._streams.wait(current, event)

    def _has(self, bucket: Bucket) -> bool:
        return bucket.flat.device.type == self._streams.device_type


class NoStreams:
    """On a CPU what was started earlier is done earlier."""

    def wrote(self, bucket: Bucket) -> None:
        pass

    before_communication = after = before_release = wrote

    @contextlib.contextmanager
    def writing(self, bucket: Bucket) -> Iterator[None]:
        yield


def streams_for(buckets: Sequence[Bucket]) -> BucketStreams | NoStreams:
    """What keeps the order of work on the buckets' devices. The current stream has just made the buckets."""
    if not any(bucket.flat.device.type == "cuda" for bucket in buckets):
        return NoStreams()
    streams = BucketStreams(CudaStreams())
    for bucket in buckets:
        streams.wrote(bucket)
    return streams
