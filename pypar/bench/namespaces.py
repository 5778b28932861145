"""Two hosts on one machine: network namespaces joined by a cable of a given speed.

The namespaces have no name and are nowhere mounted: they live as long as a process in them does, and the cable with
them. The processes die with their parent. So nothing is left, whoever is killed when.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess

import torch.distributed as dist

NUM_HOSTS = 2
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


def why_not() -> str | None:
    """Why this machine cannot do it; None where it can. Tries it once, in a process of its own."""
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"the program {program!r} is missing (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    trial = "ip link add trial0 type veth peer name trial1 && " + " ".join(_shape("trial0", 10**9))
    made = subprocess.run(["unshare", "-n", "sh", "-c", trial], capture_output=True, text=True)
    return f"the kernel does not permit it: {made.stderr.strip()}" if made.returncode else None


def enter(store: dist.Store, rank: int, host: int, bits_per_second: int) -> None:
    """Puts this process, and the threads that it starts from now on, on host 0 or 1; all ranks call it, once.

    The first rank of a host makes it. Afterwards gloo and torch's own connections find the way; the store must not
    be one over the network.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    is_first = store.add(f"namespace/{host}/members", 1) == 1
    if is_first:
        _check(libc.unshare(_CLONE_NEWNET), "unshare")
        store.set(f"namespace/{host}/pid", str(os.getpid()))
    else:
        with open(f"/proc/{int(store.get(f'namespace/{host}/pid'))}/ns/net") as namespace:
            _check(libc.setns(namespace.fileno(), _CLONE_NEWNET), "setns")
    cable = f"pypar{host}"
    if is_first and host == 0:
        other = int(store.get("namespace/1/pid"))
        _ip("link", "add", cable, "type", "veth", "peer", "name", "pypar1", "netns", str(other))
        store.set("namespace/cable", "laid")
    store.get("namespace/cable")
    if is_first:
        _ip("addr", "add", f"10.77.0.{host + 1}/24", "dev", cable)
        subprocess.run(_shape(cable, bits_per_second), check=True)
        _ip("link", "set", "lo", "up")
        _ip("link", "set", cable, "up")
        store.set(f"namespace/{host}/up", "yes")
    for other in range(NUM_HOSTS):
        store.get(f"namespace/{other}/up")
    os.environ["GLOO_SOCKET_IFNAME"] = cable


def shape(host: int, bits_per_second: int) -> None:
    """Sets the speed of what this host sends from now on; a rank of the host calls it."""
    subprocess.run(_shape(f"pypar{host}", bits_per_second), check=True)


def _shape(device: str, bits_per_second: int) -> list[str]:
    """A token bucket as large as some segments of the largest size, which the kernel hands over in one piece."""
    return (
        f"tc qdisc replace dev {device} root tbf rate {bits_per_second}bit burst 256kb latency 100ms".split()
    )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
