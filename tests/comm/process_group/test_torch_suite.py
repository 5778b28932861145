"""torch's own suite for process groups (torch.testing._internal.distributed), with "pypar" as the backend."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("torch_suite.py")
# One of every kind.
SAMPLE = [
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_accumulate_gradients_no_sync_allreduce_hook",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_max",
    "test_all_reduce_sum_async",
    "test_barrier_timeout_full_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_gather_checks",
    "test_get_future",
    "test_reduce_sum_twice",
    "test_scatter_complex",
    "test_send_recv_any_source_torch_profiler",
    "test_static_graph_api_cpu",
]
# Asked of gloo, and not of this backend.
NOT_APPLICABLE = {
    "test_monitored_barrier_gloo": "torch gives monitored_barrier to a backend called gloo only",
    "test_monitored_barrier_gloo_rank_0_timeout": "torch gives monitored_barrier to a backend called gloo only",
    "test_monitored_barrier_gloo_subgroup": "torch gives monitored_barrier to a backend called gloo only",
    "test_sparse_all_reduce_sum": "sparse tensors: refused with a sentence that names gloo",
}
# What torch's suite itself leaves out here: reasons as it prints them.
LEFT_OUT_BY_TORCH = {
    r"CUDA|cuda|GPU|[Mm]ulti-?gpu": "a GPU",
    r"N[Cc][Cc][Ll]|nccl": "NCCL's own",
    r"Only MPI|mpi backend": "MPI's alone, or not MPI's: the other runs have it, all_to_all is in the run as mpi",
    r"small world size|world size of 4": "another number of ranks, in another run",
    r"github.com/pytorch|flak|failing": "known to fail or to be unreliable in torch itself",
    r"torchvision": "a package that is not needed otherwise",
    r"[Gg]loo|GLOO|mpi does not": "gloo's own, in the run as mpi",
}


def run_suite(like: str, num_ranks: int, names: list[str], timeout_s: float) -> dict:
    command = [sys.executable, str(RUNNER), like, str(num_ranks), *names]
    outcome = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    assert outcome.returncode == 0, outcome.stdout[-6000:]
    report = json.loads(outcome.stdout.splitlines()[-1])
    report["output"] = outcome.stdout
    return report


def test_a_sample_of_torchs_suite():
    report = run_suite("gloo", 3, SAMPLE, 240)
    assert report["failed"] == [], report["output"][-6000:]
    assert sorted(report["passed"]) == sorted(SAMPLE), report["skipped"]


@pytest.mark.slow
@pytest.mark.parametrize(("like", "num_ranks"), [("gloo", 3), ("gloo", 4), ("mpi", 3)])
def test_torchs_suite(like, num_ranks):
    report = run_suite(like, num_ranks, [], 900)
    assert set(report["failed"]) <= set(NOT_APPLICABLE), report["output"][-6000:]
    for name, reason in report["skipped"].items():
        assert any(re.search(known, reason) for known in LEFT_OUT_BY_TORCH), (name, reason)
    assert len(report["passed"]) >= 80  # of 285 with torch 2.13, most of the others are for GPUs
