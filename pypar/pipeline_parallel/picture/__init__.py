"""Draws a schedule as text: one row a rank, time from left to right."""

from __future__ import annotations

from pypar.pipeline_parallel.action import Schedule
from pypar.pipeline_parallel.simulate import Simulation, simulate
from pypar.pipeline_parallel.validate.fault import short

MOST_CELLS = 4000  # of a row, unless the time of a cell is given


def picture(simulation: Simulation, *, time_per_cell: float | None = None) -> str:
    """A grid of one row a rank; each cell is `time_per_cell` long (by default the shortest action,
    or longer where a row would have more than MOST_CELLS; an action shorter than half a cell may not be seen).

    An action is written as its kind and microbatch (`F3`; with several stages a rank `F3.1`, the stage after
    the dot; with `'` behind it on the second path of a bidirectional schedule) and drawn on with `-` while it
    lasts; `.` is idle time. The last line names the bubble.
    """
    actions_and_times = [
        (rank, action, begins, ends)
        for rank, actions in enumerate(simulation.schedule.lists)
        for action, begins, ends in zip(actions, simulation.start[rank], simulation.end[rank], strict=True)
    ]
    shortest = min((ends - begins for _, _, begins, ends in actions_and_times if ends > begins), default=1.0)
    longest = max(ends for _, _, _, ends in actions_and_times)
    cell = max(shortest, longest / MOST_CELLS) if time_per_cell is None else time_per_cell
    if cell <= 0:
        raise ValueError(
            f"time_per_cell ({time_per_cell}) must be positive; leave it out for the shortest action"
        )
    width = max(len(short(simulation.schedule, action)) for _, action, _, _ in actions_and_times)
    columns = round(longest / cell)
    grid = [["." * width] * columns for _ in simulation.schedule.lists]
    for rank, action, begins, ends in actions_and_times:
        first, last = round(begins / cell), round(ends / cell)
        for column in range(first, last):
            grid[rank][column] = "-" * width
        if first < last:
            grid[rank][first] = short(simulation.schedule, action).ljust(
                width, "-" if last - first > 1 else " "
            )
    name_width = len(str(len(grid) - 1))
    rows = [f"rank {rank:>{name_width}} |{' '.join(cells)}|" for rank, cells in enumerate(grid)]
    summary = f"bubble {simulation.span_bubble:.2%}, peak microbatches in flight {simulation.peak_in_flight}"
    return "\n".join([*rows, summary])


def picture_of(schedule: Schedule) -> str:
    """`picture` of a schedule whose F, I and W all take equal time (so B takes two cells)."""
    return picture(simulate(schedule))
