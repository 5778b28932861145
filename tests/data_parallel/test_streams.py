"""Gradient buckets on several streams of a device: every access has its order, and a forgotten wait is found."""

import contextlib

import pytest
import torch
from torch import nn

from pypar.comm.traffic import Traffic
from pypar.data_parallel import GradientBuckets, arguments, buckets, reduction
from pypar.data_parallel.streams import BucketStreams, NoStreams, streams_for
from pypar.mesh import Axis
from tests.data_parallel.fake_streams import FakeNccl, FakeStreams, RaceError

TWO_RANKS = Axis("data", None, 0, 2, (0, 1), Traffic("data"))


@pytest.fixture
def job(monkeypatch):
    """job(streams class) -> (made buckets, their parameters, streams, nccl): one rank's side of a run on two."""

    def make(kind=BucketStreams, bucket_bytes=64, rebuild=False):
        streams = FakeStreams()
        nccl = FakeNccl(streams)
        monkeypatch.setattr(arguments, "first_difference", lambda *_: None)
        monkeypatch.setattr(buckets, "agree_on_order", lambda slots, seen, axis: list(seen))
        monkeypatch.setattr(buckets, "streams_for", lambda _: kind(streams))
        monkeypatch.setattr(reduction, "all_reduce_start", nccl.all_reduce_start)
        parameters = [nn.Parameter(torch.zeros(8)) for _ in range(6)]
        made = GradientBuckets(
            parameters, TWO_RANKS, bucket_bytes=bucket_bytes, first_bucket_bytes=bucket_bytes, rebuild=rebuild
        )
        return made, parameters, streams, nccl

    return make


def backward(made, parameters, streams, order=(5, 4, 3, 2, 1, 0), names=("main", "side", "other")):
    """Gradients arrive on different streams, which have waited for main's forward."""
    for name in names[1:]:
        streams.order("main", name)
    for position, index in enumerate(order):
        parameter = parameters[index]
        with streams.on(names[position % len(names)]):
            streams.writes(made.gradient(parameter), f"gradient {index}")
            parameter.grad = made.gradient(parameter)
            made.arrived(parameter)


def zero(made, parameters, streams):
    made.zero()
    for parameter in parameters:
        streams.writes(made.gradient(parameter), "zero()")


def step(made, parameters, streams, **options):
    zero(made, parameters, streams)
    backward(made, parameters, streams, **options)
    made.finish()
    for index, parameter in enumerate(parameters):
        streams.reads(made.gradient(parameter), f"the optimizer on gradient {index}")


@pytest.mark.parametrize("bucket_bytes", [32, 64, 1 << 20])
@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (0, 3, 1, 5, 2, 4)])
def test_no_race_whatever_stream_wrote_last(job, bucket_bytes, order):
    made, parameters, streams, _ = job(bucket_bytes=bucket_bytes)
    for _ in range(3):
        step(made, parameters, streams, order=order)
    assert streams.num_waits > 0


def test_one_stream_alone_waits_for_nobody_but_the_reduction(job):
    made, parameters, streams, nccl = job()
    step(made, parameters, streams, names=("main",))
    assert streams.num_waits == 2 * made.num_buckets  # NCCL's for main, main's for NCCL


def test_a_gradient_that_never_arrives_was_written_by_zero(job):
    """finish() on another stream than zero(): the reduction reads zeros that may not be there yet."""
    made, parameters, streams, _ = job()
    zero(made, parameters, streams)
    backward(made, parameters, streams, order=(5, 4, 3), names=("main",))
    with streams.on("late"):
        made.finish()


def test_zero_and_scale_on_a_stream_of_their_own_wait_for_the_sum(job):
    made, parameters, streams, _ = job()
    zero(made, parameters, streams)
    backward(made, parameters, streams)
    made.finish()
    with streams.on("clipping"):
        made.scale(0.5)
        for parameter in parameters:
            streams.writes(made.gradient(parameter), "scale()")
    streams.order("clipping", "main")
    step(made, parameters, streams)


def test_buckets_that_are_rebuilt_leave_their_memory_when_it_is_free(job):
    made, parameters, streams, _ = job(rebuild=True)
    old = [bucket.flat for bucket in made._buckets]
    zero(made, parameters, streams)
    backward(made, parameters, streams, order=(0, 1, 2, 3, 4, 5))
    with streams.on("late"):
        made.finish()
        for flat in old:
            streams.reads(flat, "the copy into the new buckets", "late")
    assert made._buckets[0].flat is not old[0]
    for flat in old:
        streams.free(flat, taken_on="main")


class WaitsForTheLastWriterOnly(BucketStreams):
    def wrote(self, bucket):
        self._events.pop(bucket, None)
        super().wrote(bucket)


class ForgetsOneWriter(BucketStreams):
    def wrote(self, bucket):
        if self._streams.current() != "side":
            super().wrote(bucket)


class WaitsForNobody(BucketStreams):
    def before_communication(self, bucket):
        pass


class MainWaits(BucketStreams):
    """The default stream waits in place of the current one."""

    def before_communication(self, bucket):
        with self._streams.on("main"):
            super().before_communication(bucket)


class OverwritesAtOnce(BucketStreams):
    def writing(self, bucket):
        return contextlib.nullcontext()


class FreesAtOnce(BucketStreams):
    def before_release(self, bucket):
        pass


@pytest.mark.parametrize("kind", [WaitsForTheLastWriterOnly, ForgetsOneWriter, WaitsForNobody, MainWaits])
def test_a_reduction_that_misses_a_writer_is_found(job, kind):
    made, parameters, streams, _ = job(kind)
    with pytest.raises(RaceError, match=r"the reduction on stream nccl does not wait for (gradient \d|zero)"):
        step(made, parameters, streams)


def test_a_finish_that_does_not_wait_is_found(job):
    made, parameters, streams, nccl = job()
    nccl.is_waited_for = False
    with pytest.raises(RaceError, match="the optimizer on gradient .* does not wait for the reduction"):
        step(made, parameters, streams, names=("main",))


def test_a_buffer_used_again_too_early_is_found(job):
    made, parameters, streams, _ = job(OverwritesAtOnce)
    step(made, parameters, streams)
    with streams.on("clipping"), pytest.raises(RaceError, match="on stream clipping does not wait for"):
        zero(made, parameters, streams)


def test_memory_given_away_too_early_is_found(job):
    with pytest.raises(RaceError, match="the memory's next owner on stream main does not wait for"):
        test_buckets_that_are_rebuilt_leave_their_memory_when_it_is_free(
            lambda **options: job(FreesAtOnce, **options)
        )


def test_a_cpu_has_no_streams(job):
    made, *_ = job(lambda _: NoStreams())
    assert isinstance(streams_for(made._buckets), NoStreams)
