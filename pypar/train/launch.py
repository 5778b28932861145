"""Starting the ranks of this machine with torch's elastic agent, and explaining how one ended."""

import contextlib
import ctypes
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHER = "PYPAR_LAUNCHER_PID"  # set in the ranks that `launch` starts
SHUTDOWN_SECONDS = 5  # from SIGTERM to SIGKILL for the ranks that are left when one has failed
FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def joined_world_size() -> int | None:
    """Ranks of the job that this process is one of (torchrun's variables); None where it is of none."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= set(os.environ) else None


def launched_here() -> bool:
    """Whether this process is a rank that `launch` started."""
    return LAUNCHER in os.environ and "RANK" in os.environ


def end_with_launcher() -> None:
    """In a rank under an elastic agent: be killed when the agent dies, however it dies (Linux)."""
    if sys.platform != "linux" or not (launched_here() or "TORCHELASTIC_RUN_ID" in os.environ):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if launched_here() and os.getppid() != int(os.environ[LAUNCHER]):  # it died before the line above
        os._exit(1)


def run_rank(job: Callable[[], None]) -> None:
    """Run a rank's job; an exception goes to the agent's error file, from which `launch` shows it once."""
    try:
        job()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Exception as error:
        _record(error)
        if not launched_here():
            raise
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Not sys.exit: the threads of a broken process group may not end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _record(error: Exception) -> None:
    """In the format of torch.distributed.elastic's error files, with a finer time."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = time.time_ns()
        text = "".join(traceback.format_exception(error))
        info = {"py_callstack": text, "timestamp": str(now // 10**9), "time_ns": now}
        content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": info}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def launch(
    arguments: Sequence[str], num_ranks: int, *, threads: int, folder: Path, resume: Callable[[], str]
) -> int:
    """Run ``python -m pypar.cli`` with ``arguments`` in ``num_ranks`` local ranks; the exit code.

    threads: of each rank. folder: for the ranks' error files, removed at the end. resume: gives the sentence
    that says how to go on, once a rank has failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with _emptied(folder), _environment(_rank_environment(threads)):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "pypar.cli", *arguments)
        except ChildFailedError as error:
            print(f"pypar: {explain(error.failures, sys.stderr.write)}; {resume()}", file=sys.stderr)
            return 1
        except SignalException as error:
            print(f"pypar: stopped by {error.sigval.name}; {resume()}", file=sys.stderr)
            return 128 + error.sigval
    return 0


def _rank_environment(threads: int) -> dict[str, str]:
    variables = {
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # no host name to resolve
    return variables


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed launcher left
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _order(failure: "ProcessFailure") -> tuple[int, int]:
    """Cause before consequence: a fatal signal, the first exception, other ends, the agent's SIGTERM."""
    if -failure.exitcode in FATAL:
        return 0, 0
    info = _info(failure)
    if info:
        return 1, int(info.get("time_ns", failure.timestamp * 10**9))
    return (3, 0) if -failure.exitcode == signal.SIGTERM else (2, 0)


def _info(failure: "ProcessFailure") -> dict:
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def explain(failures: "Mapping[int, ProcessFailure]", show: Callable[[str], object]) -> str:
    """Half a sentence on the rank that failed first; its traceback, where it has one, goes to ``show``."""
    rank = min(failures, key=lambda r: _order(failures[r]))
    failure = failures[rank]
    info = _info(failure)
    if info:
        show(info.get("py_callstack", ""))
        return f"rank {rank} failed: {failure.error_file_data['message']['message']}"
    if failure.exitcode < 0:
        perhaps = ", perhaps for want of memory" if -failure.exitcode == signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}{perhaps}"
    return f"rank {rank} ended with exit code {failure.exitcode}"


def resume_sentence(arguments: Sequence[str], newest: Path | None) -> str:
    """How to go on from the checkpoint ``newest`` of a run started as ``pypar`` ``arguments``."""
    if newest is None:
        return "no checkpoint had been written yet"
    kept = [a for a in arguments if a not in ("--overwrite", "--resume")]
    return f"continue from {newest.name} with: {shlex.join(['pypar', *kept, '--resume'])}"


def give_up(sentence: str) -> NoReturn:
    """Refuse: one sentence on stderr (under a launcher or torchrun from one rank a node), exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"pypar: {sentence}", file=sys.stderr)
    raise SystemExit(2)
