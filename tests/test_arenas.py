"""Arenas count what is taken and keep their budget; copies between them arrive in order, and errors at wait."""

import gc
import threading

import pytest
import torch

from pypar.arenas import Arena, Copies, OverBudgetError

CPU = torch.device("cpu")


def test_every_byte_is_counted_and_freed_storage_is_empty():
    arena = Arena("device", CPU)
    a, b = arena.empty((3, 5), torch.float32), arena.empty((7,), torch.bfloat16)
    assert (arena.now, arena.peak) == (74, 74) and a.shape == (3, 5) and b.dtype == torch.bfloat16
    view = a[1]
    arena.free(a)
    assert (arena.now, arena.peak) == (14, 74) and view.untyped_storage().size() == 0
    arena.bring(a)
    arena.bring(a)
    assert arena.now == 74 and view.untyped_storage().size() == 60
    arena.free(a)
    arena.reset_peak()
    arena.count(100)
    arena.count(-100)
    assert (arena.now, arena.peak) == (14, 114)


def test_what_is_forgotten_lives_as_long_as_somebody_holds_it():
    arena = Arena("host", CPU, budget_bytes=64)
    x = arena.empty((16,), torch.float32).zero_()
    arena.forget(x)
    assert arena.now == 0 and x.untyped_storage().size() == 64
    arena.empty((16,), torch.float32)


def test_nothing_is_taken_beyond_the_budget():
    arena = Arena("host", CPU, budget_bytes=64)
    kept = arena.empty((10,), torch.float32)
    with pytest.raises(
        OverBudgetError, match="host arena holds 40 bytes of its budget of 64, and 32 more .* by 8 bytes"
    ):
        arena.empty((8,), torch.float32)
    assert (arena.now, arena.peak) == (40, 40)
    arena.empty((6,), torch.float32)
    arena.free(kept)
    assert arena.now == 24
    with pytest.raises(ValueError, match="-1 bytes.* must not be negative"):
        Arena("host", CPU, budget_bytes=-1)


def test_copies_are_made_in_the_order_of_their_starts():
    copies = Copies(CPU)
    source, host, back = torch.arange(1 << 16).float(), torch.empty(1 << 16), torch.empty(1 << 16)
    started = []
    for _ in range(20):
        started.append(copies.to_host_start(host, source))
        started.append(copies.to_device_start(back, host))
    started[-1].wait()
    assert all(copy.is_over for copy in started) and torch.equal(back, source)
    assert copies.to_host == copies.to_device == 20 * source.nbytes


def test_a_copy_rounds_to_the_dtype_of_what_it_fills():
    copies = Copies(CPU)
    source, into = torch.randn(33), torch.empty(33, dtype=torch.bfloat16)
    copies.to_device_start(into, source).wait()
    assert torch.equal(into, source.bfloat16()) and copies.to_device == 66


def test_an_error_of_a_copy_arrives_at_its_wait():
    copies = Copies(CPU)
    into = torch.empty(4, device="meta")
    good = torch.empty(4)
    failed = copies.to_device_start(good, into)  # a meta tensor has no values
    with pytest.raises(NotImplementedError):
        failed.wait()
    copies.to_device_start(good, torch.ones(4)).wait()
    assert good.sum() == 4


def test_the_thread_ends_with_its_owner():
    before = set(threading.enumerate())
    copies = Copies(CPU)
    copies.to_host_start(torch.empty(2), torch.ones(2)).wait()
    (thread,) = set(threading.enumerate()) - before
    del copies
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
