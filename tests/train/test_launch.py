"""What `pypar train` says when ranks end before their time."""

import signal
from pathlib import Path

from pypar.train import launch


class _Failure:
    """Stands for torch.distributed.elastic's ProcessFailure of one rank."""

    def __init__(self, exitcode: int, time_ns: int | None = None) -> None:
        self.exitcode, self.timestamp = exitcode, 0
        info = {"py_callstack": "the stack\n", "time_ns": time_ns}
        self.error_file_data = {
            "message": {"message": "ValueError: no", "extraInfo": info} if time_ns else "<NONE>"
        }


def test_the_cause_is_told_from_its_consequences() -> None:
    shown: list[str] = []
    broken_pipe, terminated, aborted = _Failure(1, 20), _Failure(-signal.SIGTERM), _Failure(-signal.SIGABRT)
    killed, first = _Failure(-signal.SIGKILL), _Failure(1, 10)
    told = launch.explain({0: broken_pipe, 1: killed, 2: terminated}, shown.append)  # type: ignore[dict-item]
    assert told.startswith("rank 1 was killed by SIGKILL") and shown == []
    told = launch.explain({0: broken_pipe, 1: aborted, 2: terminated, 3: first}, shown.append)  # type: ignore[dict-item]
    assert told == "rank 3 failed: ValueError: no" and shown == ["the stack\n"]
    assert launch.explain({0: terminated, 1: aborted}, shown.append) == "rank 1 was killed by SIGABRT"  # type: ignore[dict-item]
    assert launch.explain({4: _Failure(3)}, shown.append) == "rank 4 ended with exit code 3"  # type: ignore[dict-item]


def test_how_to_go_on() -> None:
    arguments = ["train", "--name", "a b", "--overwrite"]
    said = launch.resume_sentence(arguments, Path("runs/a b/checkpoints/step_00000005"))
    assert said == "continue from step_00000005 with: pypar train --name 'a b' --resume"
    assert launch.resume_sentence(arguments, None) == "no checkpoint had been written yet"
