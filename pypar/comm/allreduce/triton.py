"""The ranks' buffers by torch's symmetric memory, and the Triton kernels of kernels/allreduce.py over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pypar.comm.allreduce.cuda import gpu_refusal
from pypar.comm.allreduce.ranks import Ranks
from pypar.ops.backend.gpu import TRITON_MISSING

NAME = "triton"


def unsupported(device: torch.device) -> str | None:
    """Why these kernels cannot run on this device, or None."""
    return TRITON_MISSING or gpu_refusal(device)


def connect(ranks: Ranks, device: torch.device, max_bytes: int, timeout_ms: int) -> TritonPeers:
    """Collective. RuntimeError, the same on every rank, where torch cannot share memory between the peers."""
    from pypar.kernels import allreduce_launches as allreduce

    limit = timeout_ms * 1_000_000 if timeout_ms else allreduce.FOREVER.value

    def rendezvous() -> None:
        workspaces.append(allreduce.symmetric_workspace(ranks.group, device, max_bytes, limit))

    workspaces: list[Any] = []
    ranks.agree("sharing torch's symmetric memory", rendezvous)
    return TritonPeers(ranks, workspaces[0])


class TritonPeers:
    """One-shot and two-shot, and the fused form, which is one-shot always."""

    name = NAME

    def __init__(self, ranks: Ranks, workspace: Any) -> None:
        from pypar.kernels import allreduce_launches as allreduce

        self._ranks, self._workspace, self._kernels = ranks, workspace, allreduce

    def all_reduce(self, x: Tensor, y: Tensor, two_shot: bool) -> None:
        self._run(self._kernels.all_reduce_launch(self._workspace, x, y, two_shot), x)

    def norm_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        """Why the fused kernel does not take these, or None."""
        most, row_bytes = self._kernels.LARGEST_ROW_BYTES, x.shape[-1] * x.element_size()
        return None if 0 < row_bytes <= most else f"a row of {row_bytes} bytes is longer than {most}"

    def residual_norm(self, tensors: dict[str, Tensor], eps: float, two_shot: bool) -> None:
        x, residual, weight, out, kept = (
            tensors[name] for name in ("x", "residual", "weight", "out", "residual_out")
        )
        launch = self._kernels.residual_norm_launch(self._workspace, x, residual, weight, eps, out, kept)
        self._run(launch, x)

    def _run(self, launch: Any, x: Tensor) -> None:
        with torch.cuda.device(x.device):
            launch.run()

    def error(self) -> tuple[int, int, str] | None:
        """(rank waited for, number of the call, what was waited for) of a wait past its time-out."""
        return self._kernels.describe(self._workspace.error.item())

    def close(self) -> None:
        """Collective unless a wait has failed, when the buffer stays: a peer may still be reading it."""
        if self._workspace is None:
            return
        if self.error() is None:
            self._ranks.gather(None)  # nobody frees what somebody still reads
            self._workspace = None
