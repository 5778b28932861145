"""Runs programs of examples/ as torchrun would: one process loads the libraries, and its forks are the ranks.

    python tests/documents/example_ranks.py       then, on stdin, a line for each program: {"path", "ranks", "folder"}

Each line is answered by one on stdout: {"codes": exit code by rank, "output": what all of them printed}. The process
itself starts no thread before a fork, so that the forks are whole.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

TIMEOUT_S = 120.0  # of one program; most take a second, but tests run beside each other


def _load() -> None:
    import torch
    import torch._dynamo  # with every optimizer
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pypar.comm  # noqa: F401

    torch.set_num_threads(1)


def _rank(path: str, environment: dict[str, str], folder: Path, output: int) -> None:
    """The life of one fork; never returns."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = [path]
        runpy.run_path(path, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(path: str, ranks: int, folder: Path) -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    output = os.open(folder / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    left = {}
    for rank in range(ranks):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = names | {name: str(value) for name, value in places.items()} if ranks > 1 else {}
        pid = os.fork()
        if pid == 0:
            _rank(path, environment, folder, output)
        left[pid] = rank
    os.close(output)
    codes = _wait(left)
    said = (folder / "output").read_text(errors="replace")
    killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
    late = f"ranks {killed} had not ended after {TIMEOUT_S:.0f} s, or were killed" if killed else ""
    return {"codes": codes, "output": said + late}


def _wait(left: dict[int, int]) -> list[int]:
    """Exit codes by rank; what is there when the time is over is killed."""
    codes, end = [0] * len(left), time.monotonic() + TIMEOUT_S
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return codes


def main() -> None:
    _load()
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _run(asked["path"], asked["ranks"], Path(asked["folder"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
