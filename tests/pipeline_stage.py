"""A small model in stages, and runtimes over it, for the tests of the pipeline runtime."""

import random

import torch
from torch import nn

from pypar.mesh import Axis
from pypar.pipeline_parallel import PipelineRuntime
from pypar.pipeline_parallel.action import Action, local_dependency, needed_by, sent_by

WIDTH, ROWS = 6, 3


class Stage(nn.Module):
    """Two layers; the last stage turns its output into a loss."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(100 + stage)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.is_last = stage == num_stages - 1

    def forward(self, hidden, microbatch):
        x = microbatch if hidden is None else hidden
        x = x + self.second(torch.tanh(self.first(x)))
        return x.square().mean() if self.is_last else x


def microbatches(number):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(number)]


def world_axis():
    if not torch.distributed.is_initialized():
        return Axis.single("pp")
    return Axis.of(torch.distributed.group.WORLD, "pp")


def stage_runtime(schedule, num_stages, axis):
    own = sorted({action.stage for action in schedule[axis.rank]})
    stages = {stage: Stage(stage, num_stages) for stage in own}
    module = stages if len(own) > 1 else stages[own[0]]
    runtime = PipelineRuntime(
        module,
        axis,
        schedule,
        activation_shape=(ROWS, WIDTH),
        activation_dtype=torch.float32,
        device="cpu",
    )
    return runtime, stages


def random_schedule(owners, num_microbatches, seed):
    """A valid schedule in random order, stage s on rank owners[s]; a stage's backwards run in order."""
    pick = random.Random(seed)
    num_stages = len(owners)
    waiting = [Action(k, s, m) for m in range(num_microbatches) for s in range(num_stages) for k in "FB"]
    schedule = [[] for _ in range(max(owners) + 1)]
    done, sent = {None}, {None}
    while waiting:
        ready = [a for a in waiting if needed_by(a, num_stages) in sent and local_dependency(a) in done]
        ready = [
            a
            for a in ready
            if a.kind == "F" or a.microbatch == min(b.microbatch for b in waiting if b[:2] == a[:2])
        ]
        action = pick.choice(ready)
        waiting.remove(action)
        done.add(action)
        sent.add(sent_by(action, num_stages))
        schedule[owners[action.stage]].append(action)
    return schedule


def single_runtime(module, schedule):
    return PipelineRuntime(
        module,
        Axis.single("pp"),
        schedule,
        activation_shape=(ROWS, WIDTH),
        activation_dtype=torch.float32,
        device="cpu",
    )
