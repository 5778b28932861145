"""What passes between pipeline stages: several tensors, changing lengths, headers, failures."""

import pytest
import torch
from torch import nn

from pypar.pipeline_parallel import PipelineRuntime, schedules
from pypar.pipeline_parallel.messages.header import (
    HEADER_BYTES,
    Header,
    TensorSpec,
    decode,
    describe,
    encode,
    pack,
    unpack,
)
from tests.pipeline_parallel.stage import (
    INTERLEAVED,
    ONE_STAGE,
    WIDTH,
    Stage,
    microbatches,
    random_schedule,
    single_runtime,
    world_axis,
)


class Rich(nn.Module):
    """A stage of a model that passes on a hidden state, what the encoder made, token kinds, and sometimes None."""

    def __init__(self, stage, num_stages):
        super().__init__()
        torch.manual_seed(200 + stage)
        self.stage, self.is_last = stage, stage == num_stages - 1
        self.embedding = nn.Embedding(5, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.keep = nn.Linear(WIDTH, WIDTH)

    def forward(self, received, tokens):
        if received is None:
            hidden, memory, kinds = (
                self.embedding(tokens),
                self.keep(self.embedding(tokens)).bfloat16(),
                tokens % 3,
            )
        else:
            hidden, memory, kinds, none = received
            assert none is None and kinds.dtype == torch.int64 and memory.dtype == torch.bfloat16
            assert not kinds.requires_grad and tokens.shape == kinds.shape == hidden.shape[:-1]
        hidden = hidden + torch.tanh(self.mix(hidden)) * kinds[..., None] + memory.float()
        if self.is_last:
            return hidden.square().mean()
        return hidden, memory, kinds, None  # from the second stage on, memory is handed on as it came


def _tokens(lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, (2, length), generator=generator) for length in lengths]


def _reference(num_stages, lengths):
    stages = [Rich(stage, num_stages) for stage in range(num_stages)]
    losses = []
    for tokens in _tokens(lengths):
        received = None
        for stage in stages:
            received = stage(received, tokens)
        received.backward()
        losses.append(received.item())
    return losses, [[p.grad for p in stage.parameters()] for stage in stages]


# One step a row: messages grow, shrink and are empty.
LENGTHS = [[4, 4, 4], [4, 4, 4], [4, 9, 4], [2, 2, 2], [1, 2, 3], [0, 7, 7], [7, 12, 0]]


def _rich_steps(schedule):
    axis = world_axis()
    stages = {s: Rich(s, schedule.num_stages) for _, s in schedule.stages_of(axis.rank)}
    runtime = PipelineRuntime(stages, axis, schedule)
    seen = []
    for lengths in LENGTHS:
        for stage in stages.values():
            stage.zero_grad()
        evaluated = [loss.item() for loss in runtime.evaluate(_tokens(lengths[::-1]))]
        losses = [loss.item() for loss in runtime.step(_tokens(lengths))]
        gradients = {s: [p.grad for p in stage.parameters()] for s, stage in stages.items()}
        seen.append((losses, evaluated, gradients))
    return seen


def _check_rich(results, schedule):
    for step, lengths in enumerate(LENGTHS):
        losses, gradients = _reference(schedule.num_stages, lengths)
        evaluated, _ = _reference(schedule.num_stages, lengths[::-1])
        last = schedule.placement[0, schedule.num_stages - 1]
        for rank, result in enumerate(results):
            own_losses, own_evaluated, own_gradients = result[step]
            expected = [losses, evaluated] if rank == last else [[], []]
            pairs = [([own_losses, own_evaluated], expected)]
            pairs += [(own, gradients[stage]) for stage, own in own_gradients.items()]
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("owners", [[0, 1], [0, 1, 1, 0]])
def test_tuples_of_any_tensors_and_changing_lengths(ranks, owners, splits):
    schedule = random_schedule(owners, 3, 5, splits)
    _check_rich(ranks(2, _rich_steps, schedule), schedule)


def test_tuples_in_one_process():
    schedule = random_schedule([0, 0, 0], 3, 5, splits=True)
    _check_rich([_rich_steps(schedule)], schedule)


def _traffic_of_steps(lengths):
    """(transfers, bytes) that this rank started to send in each step."""
    axis = world_axis()
    runtime = PipelineRuntime(Rich(axis.rank, 2), axis, schedules.build("one_f_one_b", 2, 2))
    seen = []
    for pair in lengths:
        axis.traffic.reset()
        runtime.step(_tokens(pair))
        seen.append((axis.traffic.calls["send"], axis.traffic.bytes_sent))
    return seen


def test_a_message_is_one_transfer_once_the_room_it_needs_is_known(ranks):
    def num_bytes(length):  # hidden, memory and kinds, each from a multiple of 64 bytes on
        hidden, memory, kinds = (2 * length * n for n in (WIDTH * 4, WIDTH * 2, 8))
        return -(-(-(-hidden // 64) * 64 + memory) // 64) * 64 + kinds

    first, _ = ranks(2, _traffic_of_steps, [(3, 3), (3, 3), (2, 1), (2, 5), (5, 2)])
    header = 2 * HEADER_BYTES
    assert first == [
        (4, header + 2 * num_bytes(3)),  # nothing is known: the tensors follow the headers
        (2, header + 2 * num_bytes(3)),
        (2, header + 2 * num_bytes(3)),  # smaller ones leave room empty
        (3, header + 2 * num_bytes(2) + num_bytes(5)),  # one is too large for its room
        (2, header + 2 * num_bytes(5)),
    ]


def test_a_write_to_one_received_tensor_is_none_to_another():
    """They lie in one buffer, and autograd's record of writes must not be one."""
    header = describe((torch.ones(2, 3), torch.ones(4)))
    buffer = torch.zeros(header.offsets[-1], dtype=torch.uint8)
    pack((torch.full((2, 3), 2.0), torch.full((4,), 3.0)), header, buffer)
    first, second = unpack(header, buffer)
    loss = first.requires_grad_(True).square().sum()
    second.zero_()
    loss.backward()
    assert torch.equal(first.grad, torch.full((2, 3), 4.0))


class Failing(Stage):
    """Fails on one microbatch; counts what it computes."""

    def __init__(self, stage, num_stages, fails_on=None, error=None):
        super().__init__(stage, num_stages)
        self.fails_on, self.error, self.calls = fails_on, error, 0

    def forward(self, received, microbatch):
        self.calls += 1
        if self.calls - 1 == self.fails_on:
            if self.error is None:
                return {"hidden": microbatch}
            raise self.error
        return super().forward(received, microbatch)


def _failure(name, failing_rank, error):
    axis = world_axis()
    stage = Failing(axis.rank, axis.size, 2 if axis.rank == failing_rank else None, error)
    runtime = PipelineRuntime(stage, axis, schedules.build(name, axis.size, 4))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        runtime.step(microbatches(4))
    calls = stage.calls
    stage.fails_on = None
    stage.zero_grad()
    losses = [loss.item() for loss in runtime.step(microbatches(4))]  # the next step is as if nothing was
    return type(raised.value).__name__, str(raised.value), calls, losses


@pytest.mark.parametrize("name", ONE_STAGE)
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_stage_that_fails_is_an_error_on_every_rank_and_nothing_hangs(ranks, name, failing_rank):
    results = ranks(3, _failure, name, failing_rank, None)
    for rank, (kind, sentence, calls, losses) in enumerate(results):
        assert kind == "ValueError" and f"stage {failing_rank} returned a dict" in sentence
        told = f"rank {failing_rank} of axis 'pp' failed in F(stage {failing_rank}, microbatch 2)"
        assert (told in sentence) == (rank != failing_rank)
        assert calls <= 4 and len(losses) == (4 if rank == 2 else 0)
    results = ranks(3, _failure, name, failing_rank, RuntimeError("no memory " * 1000))
    assert [result[0] for result in results] == ["RuntimeError"] * 3
    assert all("no memory no memory" in result[1] for result in results)


def _deaf():
    axis = world_axis()
    stage = Stage(0, 2) if axis.rank == 0 else lambda _, microbatch: Stage(0, 1)(None, microbatch)
    with pytest.raises(ValueError, match="does not depend on the input of stage 1"):
        PipelineRuntime(stage, axis, schedules.build("gpipe", 2, 1)).step(microbatches(1))


def test_a_stage_that_does_not_use_its_input_is_an_error_on_both_sides(ranks):
    ranks(2, _deaf)


def test_refusals_of_outputs():
    def refused(output):
        stages = {0: lambda received, microbatch: output, 1: Stage(1, 2)}
        single_runtime(stages, random_schedule([0, 0], 1, 0)).step(microbatches(1))

    with pytest.raises(ValueError, match="stage 0 returned a str; what passes"):
        refused("hidden")
    with pytest.raises(ValueError, match="stage 0 returned a int as item 1 of a tuple"):
        refused((torch.ones(2), 3))
    with pytest.raises(
        ValueError, match="stage 0 returned a tensor on meta, but this pipeline's tensors lie on cpu"
    ):
        refused(torch.ones(2, device="meta"))


def test_headers_are_read_as_they_were_written():
    specs = (TensorSpec((2, 3), torch.bfloat16, True), None, TensorSpec((), torch.int64, False))
    for header in (
        Header(),
        Header(specs),
        Header(specs[:1], is_tuple=False),
        Header(failure='"ä\u2713', is_mistake=True),
    ):
        assert decode(encode(header).numpy().tobytes()) == header
    assert decode(encode(Header(failure="\u2713" * 5000)).numpy().tobytes()).failure == "\u2713" * (
        HEADER_BYTES // 8
    )
    with pytest.raises(ValueError, match="passes on 300 tensors, whose shapes take"):
        encode(describe((torch.ones(2, 3),) * 300))
    with pytest.raises(ValueError, match="a tensor of torch.float8_e4m3fn does not pass"):
        encode(describe((torch.ones(2).to(torch.float8_e4m3fn),)))


def _interleaved_evaluation():
    axis = world_axis()
    stages = {s: Rich(s, 4) for _, s in INTERLEAVED.stages_of(axis.rank)}
    return [
        loss.item() for loss in PipelineRuntime(stages, axis, INTERLEAVED).evaluate(_tokens([3, 5, 2, 4]))
    ]


def test_evaluation_of_interleaved_stages(ranks):
    assert ranks(2, _interleaved_evaluation) == [[], _reference(4, [3, 5, 2, 4])[0]]
