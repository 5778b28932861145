"""The words for a fault in a schedule: a sentence, and beneath it the lists around the action, with an arrow."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Action, Schedule

AROUND = 4  # actions on either side of the one that is pointed at
MOST_RANKS = 8
PATH_MARK = "'"


def fault(schedule: Schedule, sentence: str, *places: tuple[int, int]) -> ValueError:
    """The error to raise: `sentence`, and for each (rank, position) a part of that rank's list.

    A position behind the end of a list points there. Of more than `MOST_RANKS` places the first are shown.
    """
    lines = [sentence]
    width = len(str(schedule.num_ranks - 1))
    for rank, position in places[:MOST_RANKS]:
        actions = schedule.lists[rank]
        first = max(0, position - AROUND)
        words = [short(schedule, action) for action in actions[first : position + AROUND + 1]]
        words += [""] * (position >= len(actions))
        head = f"  rank {rank:>{width}} | " + "... " * (first > 0)
        before = head + "".join(f"{word} " for word in words[: position - first])
        more = " ..." * (position + AROUND + 1 < len(actions))
        lines += [(head + " ".join(words) + more).rstrip(), " " * len(before) + "^"]
    return ValueError("\n".join(lines))


def short(schedule: Schedule, action: Action) -> str:
    """An action as pictures name it: F3, with several stages a rank F3.1, on the second path F3'."""
    stage = f".{action.stage}" if len(schedule.placement) > schedule.num_ranks else ""
    return f"{action.kind}{action.microbatch}{stage}{PATH_MARK * action.path}"
