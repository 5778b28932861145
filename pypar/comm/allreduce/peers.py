"""All-reduce among the GPUs of one node by kernels that read each other's memory."""

from __future__ import annotations

import logging
import secrets
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from pypar.comm.allreduce import cuda, triton
from pypar.comm.allreduce.ranks import Ranks
from pypar.comm.allreduce.thresholds import Thresholds, choose
from pypar.comm.shared_memory import host_identity
from pypar.ops.native import address
from pypar.ops.rms_norm import rms_norm
from pypar.ops.uncompiled import uncompiled_class

ENGINES: dict[str, ModuleType] = {m.NAME: m for m in (cuda, triton)}  # fastest first
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANKS = 8
_LOG = logging.getLogger("pypar")


def all_reduce_reference(parts: list[Tensor]) -> Tensor:
    """The definition. parts: the ranks' x, in rank order. They are added in fp32, one by one, rounded once."""
    return _total(parts).to(parts[0].dtype)


def residual_norm_reference(
    parts: list[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition of the fused form: (out, residual_out), both [..., D] of x's dtype.

    residual_out: the ranks' sum + residual, in fp32, rounded once; the sum itself is not. out: the RMS norm of
    residual_out, so that it can be computed again from what is kept.
    """
    residual_out = (_total(parts) + residual.float()).to(residual.dtype)
    return rms_norm(residual_out, weight, eps, backend="reference"), residual_out


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


@uncompiled_class("it is communication between ranks")
class PeerAllReduce:
    """Sums over the 2 to 8 ranks of a group, each with a GPU of its own in one node, without NCCL's latency.

    The result is the same bits on every rank and in every run: fp32 sums in rank order. Tensors that the peers'
    kernels are not for (`supports`), or that are larger than the thresholds, take the group's own all-reduce, whose
    order and precision are its backend's; where no tensor can take the kernels, `reason` says why and one line is
    logged. Calls of one object on one rank must be ordered: one stream, or events between streams.

    Making one is collective, and so is `close`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | Ranks | None = None,
        *,
        max_bytes: int = 64 << 20,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        backend: str | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        """max_bytes: of the largest tensor that the kernels take; the rank's GPU keeps about twice that.
        timeout_s: of a wait for a peer, 0: none. backend: "cuda" (csrc/allreduce/) or "triton", None: the first that
        runs on all ranks; a named one that does not is an error. thresholds: None: measured ones, else the shipped.
        """
        if not (backend is None or backend in ENGINES):
            raise ValueError(f"backend ({backend!r}) is none of {', '.join(ENGINES)}; use one, or None")
        if max_bytes < 1 or timeout_s < 0:
            raise ValueError(
                f"max_bytes ({max_bytes}) must be positive and timeout_s ({timeout_s}) not negative; "
                "use for example 64 << 20 and 30.0"
            )
        self.device = _with_index(device)
        self._ranks = group if isinstance(group, Ranks) else Ranks(group or c10d._get_default_group())
        self.max_bytes = max_bytes
        self.reason: str | None = None
        self._peers: Any = None
        self._failure: str | None = None
        self._told: set[tuple[torch.device, torch.dtype]] = set()
        try:
            self._peers = self._connect(backend, round(timeout_s * 1000))
        except RuntimeError as error:
            if backend is not None:
                raise
            self._refuse(str(error))
        if thresholds is None:
            name, size = self.engine, self._ranks.size
            thresholds = choose(self.device, name, size) if name else Thresholds(0, 0, "no peers")
        self.thresholds: Thresholds = self._ranks.gather(thresholds)[0]  # every rank must choose alike

    def _connect(self, backend: str | None, timeout_ms: int) -> Any:
        """The peers of the first engine that runs on all ranks. Collective; RuntimeError on all ranks alike."""
        ranks, engines = self._ranks, [backend] if backend else list(ENGINES)
        mine = {
            "token": secrets.token_hex(8),
            "host": host_identity(),
            "gpu": _gpu(self.device),
            "max_bytes": self.max_bytes,
            "refusals": {name: ENGINES[name].unsupported(self.device) for name in engines},
        }
        all_of_them = ranks.gather(mine)
        ranks.token = all_of_them[0]["token"]
        if reason := _topology_refusal(all_of_them):
            raise RuntimeError(reason)
        reasons = []
        for name in engines:
            refusals = [(rank, it["refusals"][name]) for rank, it in enumerate(all_of_them)]
            refused = next(((rank, why) for rank, why in refusals if why), None)
            if refused:
                reasons.append(f"{name} on rank {refused[0]}: {refused[1]}")
                continue
            try:
                return ENGINES[name].connect(ranks, self.device, self.max_bytes, timeout_ms)
            except RuntimeError as error:
                reasons.append(f"{name}: {error}")
        raise RuntimeError("; ".join(reasons))

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        if self._ranks.rank == 0:
            _LOG.warning("PeerAllReduce takes the group's own all-reduce for everything: %s", reason)

    @property
    def engine(self) -> str | None:
        """Whose kernels run: "cuda", "triton", or None, when `reason` says why."""
        return None if self._peers is None else self._peers.name

    @property
    def num_ranks(self) -> int:
        return self._ranks.size

    def supports(self, x: Tensor) -> str | None:
        """Why the peers' kernels do not take x, or None. The same on all ranks for x of the same shape and dtype."""
        if self._peers is None:
            return self.reason or "it was closed"
        if x.device != self.device:
            return f"x is on {x.device}, and the buffers are on {self.device}"
        if x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
        if x.nbytes > self.max_bytes:
            return f"x has {x.nbytes} bytes, and the buffers were made for {self.max_bytes}"
        return None

    def method(self, x: Tensor) -> tuple[str, str]:
        """("one-shot" | "two-shot" | "group", why)."""
        if reason := self.supports(x):
            return "group", reason
        chosen, at = self.thresholds.method(x.nbytes), self.thresholds
        return chosen, (
            f"{x.nbytes} bytes: one-shot up to {at.one_shot_max_bytes}, two-shot up to {at.two_shot_max_bytes} "
            f"({at.source})"
        )

    def all_reduce(self, x: Tensor, out: Tensor | None = None, *, method: str | None = None) -> Tensor:
        """The sum of the ranks' x, of any shape, which is the same on all ranks: a new tensor, or out, which may be x.

        method: one that `method` can give, for measuring; None: the one it gives. RuntimeError: a peer did not come in
        an earlier call, or before `check`; the object is unusable then. ValueError: out is not like x.
        """
        self.check()
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"out ({tuple(out.shape)}, {out.dtype}, {out.device}) must be like x ({tuple(x.shape)}, {x.dtype}, "
                f"{x.device}); pass a tensor of its shape and dtype, or None"
            )
        chosen = self._chosen(x, method)
        target = out if out.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        if chosen == "group":
            target.copy_(x)
            self._ranks.all_reduce(target)
        elif x.numel():
            self._peers.all_reduce(x.contiguous(), target, chosen == "two-shot")
        return target if target is out else out.copy_(target)

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, method: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, residual_out) of `residual_norm_reference` in one kernel, where the rows fit it; new tensors.

        x, residual: [..., D], the residual equal on all ranks. weight: [D], of x's dtype or float32. Beyond the
        thresholds the group's own all-reduce sums in fp32, and torch does the rest.
        """
        self.check()
        if residual.shape != x.shape or residual.dtype != x.dtype or weight.shape != x.shape[-1:]:
            raise ValueError(
                f"residual {tuple(residual.shape)} {residual.dtype} must be like x {tuple(x.shape)} {x.dtype}, and "
                f"weight {tuple(weight.shape)} one value for each of x's last dimension"
            )
        chosen = self._chosen(x, method)
        if chosen == "group" or not x.numel() or self._peers.norm_refusal(x, weight):
            total = x.float() if x.dtype != torch.float32 else x.clone()
            total = self.all_reduce(total, total, method="group" if chosen == "group" else method)
            return residual_norm_reference([total], residual, weight, eps)
        tensors = {"x": x, "residual": residual, "weight": weight}
        tensors = {name: _aligned(tensor) for name, tensor in tensors.items()}
        out, kept = torch.empty_like(tensors["x"]), torch.empty_like(tensors["x"])
        tensors |= {"out": out, "residual_out": kept}
        self._peers.residual_norm(tensors, eps, chosen == "two-shot")
        return out, kept

    def _chosen(self, x: Tensor, method: str | None) -> str:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("x requires a gradient, which this all-reduce does not have; pass x.detach()")
        if method is None:
            self._tell(x)
            return self.method(x)[0]
        if method not in ("one-shot", "two-shot", "group"):
            raise ValueError(f"method ({method!r}) is none of one-shot, two-shot, group; use one, or None")
        if method != "group" and (reason := self.supports(x)):
            raise ValueError(f"method {method} cannot take x: {reason}")
        return method

    def _tell(self, x: Tensor) -> None:
        """Logs once that tensors like x take the group's own all-reduce, unless size is the reason."""
        kind = (x.device, x.dtype)
        if self._peers is not None and kind not in self._told and x.nbytes <= self.max_bytes:
            self._told.add(kind)
            if (reason := self.supports(x)) and self._ranks.rank == 0:
                _LOG.warning("PeerAllReduce takes the group's own all-reduce: %s", reason)

    def check(self) -> None:
        """RuntimeError if a wait for a peer has passed its time-out; it looks at host memory and waits for nothing.

        Every call does it first; after a synchronisation it tells of the calls before.
        """
        if self._failure is None and self._peers is not None and (error := self._peers.error()) is not None:
            rank, call, awaited = error
            self._failure = (
                f"rank {self._ranks.rank} waited in vain for {awaited} of rank {rank} in call {call} of its "
                "PeerAllReduce: that rank has ended, hangs, or makes other calls; results since then are not sums, "
                "and this object cannot be used again"
            )
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def close(self) -> None:
        """Gives the peers' memory back. Collective, except after a failure: memory that peers may read stays then."""
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close()


def _with_index(device: torch.device | str | None) -> torch.device:
    """The device; None and a CUDA device without a number are the current GPU."""
    found = torch.device("cuda" if device is None and torch.cuda.is_available() else device or "cpu")
    if str(found) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _topology_refusal(ranks: list[dict[str, Any]]) -> str | None:
    """Why these ranks cannot be peers, or None."""
    if not 2 <= len(ranks) <= MAX_RANKS:
        return f"the group has {len(ranks)} ranks, and the kernels are for 2 to {MAX_RANKS}"
    hosts = {it["host"] for it in ranks}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts, and only those of one share memory"
    if len({it["max_bytes"] for it in ranks}) > 1:
        return f"max_bytes differs: {', '.join(str(it['max_bytes']) for it in ranks)} by rank"
    gpus = [it["gpu"] for it in ranks]
    twice = next((rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank]), None)
    if twice is not None and gpus[twice]:
        return (
            f"ranks {gpus.index(gpus[twice])} and {twice} share a GPU, where they would wait for each other"
        )
    return None


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if address(x) % 16 == 0 else x.clone()
