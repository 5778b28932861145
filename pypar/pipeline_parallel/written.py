"""Schedules as text: CSV with a line a rank, as torch.distributed.pipelining writes and reads it.

A cell is an action, its stage before its kind and its microbatch behind: `0F3`. On the second path of a schedule of two
directions an apostrophe follows. A forward and a backward that run as one are `(0F4;3B1)OVERLAP_F_B`. Empty cells are
idle slots and are not kept. Lines that begin with `#` say what cells cannot: `# num_segments=4`, and with updates
`# delays=3;2;1;0`, the delay of each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pypar.pipeline_parallel.action import BACKWARD, FORWARD, KINDS, Action, Schedule
from pypar.pipeline_parallel.validate.fault import PATH_MARK

PAIR = "OVERLAP_F_B"
_CELL = re.compile(rf"(\d+)([{''.join(KINDS)}])(\d+)({PATH_MARK}*)")
_PAIR = re.compile(rf"\(([^;()]+);([^;()]+)\){PAIR}")


def read_schedule(text: str) -> Schedule:
    """The schedule of a CSV text; ValueError for what is no action. `validate` says whether it can run."""
    lists: list[list[Action]] = []
    pairs = set()
    told: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            name, _, value = line[1:].partition("=")
            if name.strip() in told:
                raise ValueError(
                    f"line {number} of the schedule's text says {name.strip()} again; say it once"
                )
            told[name.strip()] = value.strip()
            continue
        actions: list[Action] = []
        for cell in line.split(","):
            paired = _PAIR.fullmatch(cell.strip())
            if paired:
                pairs.add((len(lists), len(actions)))
            for word in paired.groups() if paired else filter(None, [cell.strip()]):
                actions.append(_action(word, number))
        lists.append(actions)
    unknown = told.keys() - {"num_segments", "delays"}
    if unknown:
        raise ValueError(
            f"the schedule's text says {', '.join(sorted(unknown))}; lines with # say num_segments or delays"
        )
    words = filter(None, told.get("delays", "").split(";"))
    delays = {(0, stage): _count("delays", word, 0) for stage, word in enumerate(words)}
    num_segments = _count("num_segments", told.get("num_segments", "1"), 1)
    return Schedule.of(lists, pairs=pairs, num_segments=num_segments, delays=delays)


def _count(name: str, word: str, least: int) -> int:
    """What a line with # says, a whole number."""
    number = int(word) if word.strip().isdecimal() else -1
    if number < least:
        raise ValueError(
            f"the schedule's text says {name}={word}; {name} must be whole numbers that are at least {least}"
        )
    return number


def write_schedule(schedule: Schedule) -> str:
    """The opposite of `read_schedule`."""
    lines = []
    if schedule.num_segments > 1:
        lines.append(f"# num_segments={schedule.num_segments}")
    if schedule.delays:
        delays = [schedule.delays.get((0, stage), 0) for stage in range(schedule.num_stages)]
        lines.append(f"# delays={';'.join(map(str, delays))}")
    lines += [",".join(_cells(schedule, rank)) for rank in range(schedule.num_ranks)]
    return "\n".join(lines) + "\n"


def _action(word: str, number: int) -> Action:
    match = _CELL.fullmatch(word)
    if match is None:
        raise ValueError(
            f"line {number} of the schedule's text has {word!r}; an action is a stage, one of {', '.join(KINDS)} and a "
            "microbatch, such as 0F3"
        )
    stage, kind, microbatch, path = match.groups()
    return Action(kind, int(stage), int(microbatch), len(path))


def _cells(schedule: Schedule, rank: int) -> Iterator[str]:
    words = [f"{a.stage}{a.kind}{a.microbatch}{PATH_MARK * a.path}" for a in schedule.lists[rank]]
    position = 0
    while position < len(words):
        if (rank, position) in schedule.pairs:
            assert [a.kind for a in schedule.lists[rank][position : position + 2]] == [FORWARD, BACKWARD]
            yield f"({words[position]};{words[position + 1]}){PAIR}"
            position += 2
        else:
            yield words[position]
            position += 1
