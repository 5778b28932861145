"""The host runtime with several devices at once: what one may see of another's stores, and when."""

import pytest
import torch

from tests.harness.simt.build import kernel_module, register, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

RELEASE, ACQUIRE, BARRIER_BEFORE, BARRIER_AFTER = 1, 2, 4, 8
ALL_RULES = RELEASE | ACQUIRE | BARRIER_BEFORE | BARRIER_AFTER


def pass_message(num_ranks, rules, *, flavour="checked", order="random", seed=0):
    """(what the last device read, what the runtime found)"""
    module = kernel_module(flavour)
    data, out = torch.zeros(64, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    words = torch.zeros(num_ranks, dtype=torch.int32)
    module.clear_buffers()
    for name, x in {"data": data, "words": words}.items():
        module.register_buffer(x.data_ptr(), x.numel() * 4, 4, True, name, shared=True)
    register(module, out, name="out")
    module.set_options(block_order=order, thread_order=order, seed=seed, concurrent=True)
    streams = [module.create_stream() for _ in range(num_ranks)]
    found = ""
    try:
        for rank in range(num_ranks):
            module.pass_message(
                data.data_ptr(), out.data_ptr(), words.data_ptr(), rank, num_ranks, rules, streams[rank]
            )
        module.synchronize(streams[0])
    except RuntimeError as error:
        found = str(error)
    finally:
        for stream in streams:
            module.destroy_stream(stream)
        module.clear_buffers()
        module.set_options()
    return out.tolist(), found


MESSAGE = list(range(1, 65))


@pytest.mark.parametrize("flavour", ["fast", "checked"])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_release_and_acquire_compose_with_barriers_and_each_other(num_ranks, flavour):
    """The first device's message goes through all of them."""
    for order in ("linear", "reverse"):
        assert pass_message(num_ranks, ALL_RULES, flavour=flavour, order=order) == (MESSAGE, "")
    for seed in range(8):
        assert pass_message(num_ranks, ALL_RULES, flavour=flavour, seed=seed) == (MESSAGE, "")


@pytest.mark.parametrize("missing", [RELEASE, ACQUIRE, BARRIER_BEFORE, BARRIER_AFTER])
def test_every_rule_is_needed(missing):
    for seed in range(4):
        _, found = pass_message(2, ALL_RULES & ~missing, seed=seed)
        assert found.startswith("kernel pypar::cuda::pass_message_kernel"), found
        assert "race: device " in found and "no release and acquire is between" in found


def test_a_device_in_between_must_keep_them_too():
    for missing in (RELEASE, ACQUIRE):
        assert "race: device 2" in pass_message(3, ALL_RULES & ~missing)[1]


@pytest.mark.parametrize("missing", [RELEASE, BARRIER_BEFORE])
def test_stores_without_release_are_seen_late(missing):
    results = [pass_message(2, ALL_RULES & ~missing, seed=seed)[0] for seed in range(40)]
    assert any(out != MESSAGE for out in results) and all(set(out) <= {0, *MESSAGE} for out in results)


def test_nobody_waits_for_ever_unnoticed():
    module = kernel_module("fast")
    words, out = torch.zeros(2, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    module.set_options(concurrent=True)
    stream = module.create_stream()
    with pytest.raises(
        RuntimeError, match="endless wait: device .* thread .0,0,0. reads a word at messages.cu"
    ):
        module.pass_message(out.data_ptr(), out.data_ptr(), words.data_ptr(), 1, 2, ALL_RULES, stream)
        module.synchronize(stream)
    module.set_options()
    module.destroy_stream(stream)
