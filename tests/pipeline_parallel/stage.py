"""Schedules, a small model in stages, and runtimes over it, for the tests of pipelines."""

import random

import torch
from torch import nn

from pypar.mesh import Axis
from pypar.pipeline_parallel import PipelineRuntime, schedules
from pypar.pipeline_parallel.action import Action, Schedule, local_dependency
from pypar.pipeline_parallel.trained import check_trains

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
    own = [stage for _, stage in schedule.stages_of(axis.rank)]
    stages = {stage: Stage(stage, num_stages) for stage in own}
    return PipelineRuntime(stages if len(own) > 1 else stages[own[0]], axis, schedule), stages


def random_schedule(owners, num_microbatches, seed, splits=False, in_order=True):
    """A valid schedule in random order, stage s on rank owners[s].

    splits: the backward of every other stage is in two parts. in_order: a stage's weights get the gradients of
    the microbatches in their order.
    """
    pick = random.Random(seed)
    placement = {(0, stage): rank for stage, rank in enumerate(owners)}
    waiting = [
        Action(kind, stage, microbatch)
        for microbatch in range(num_microbatches)
        for stage in range(len(owners))
        for kind in ("FIW" if splits and stage % 2 == 0 else "FB")
    ]
    rules = Schedule((), placement)
    lists = [[] for _ in range(max(owners) + 1)]
    done, sent = set(), {None}
    while waiting:
        ready = [a for a in waiting if rules.needed_by(a) in sent and done.issuperset(local_dependency(a))]
        if in_order:
            ready = [a for a in ready if a.kind not in "BW" or not _has_earlier(a, waiting)]
        action = pick.choice(ready)
        waiting.remove(action)
        done.add(action)
        sent.add(rules.sent_by(action))
        lists[owners[action.stage]].append(action)
    return Schedule.of(lists, placement)


def _has_earlier(action, waiting):
    return any(a[:2] == action[:2] and a.microbatch < action.microbatch for a in waiting)


def written(*lists, placement=None, **more):
    """A schedule from texts like a picture's: "F0.1'" is F of microbatch 0 on stage 1 of path 1.

    Without a stage, the stage is the rank.
    """
    parsed = []
    for rank, text in enumerate(lists):
        words = [(word.rstrip("'"), word.count("'")) for word in text.split()]
        parsed.append(
            [
                Action(word[0], int(stage or rank), int(microbatch), path)
                for word, path in words
                for microbatch, _, stage in [word[1:].partition(".")]
            ]
        )
    return Schedule.of(parsed, placement, **more)


# Two ranks with two stages each, one in every round; arXiv 2104.04473, figure 4.
INTERLEAVED = written(
    "F0.0 F1.0 F0.2 F1.2 B0.2 B1.2 B0.0 B1.0",
    "F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 B0.1 B1.1",
)

# Two paths in opposite directions (Chimera, arXiv 2107.06925): microbatch 1 begins on rank 1.
BIDIRECTIONAL = written("F0.0 F1.1' B1.1' B0.0", "F1.0' F0.1 B0.1 B1.0'")


def _runs(name):
    try:
        check_trains(name, schedules.build(name, 4, 4))
    except ValueError:
        return False
    return True


# What the runtime runs; of them, those of one stage a rank.
RUNNING = [name for name in schedules.names() if _runs(name)]
ONE_STAGE = [name for name in RUNNING if schedules.build(name, 4, 4).num_stages == 4]


def single_runtime(stages, schedule):
    return PipelineRuntime(stages, Axis.single("pp"), schedule)
