"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.harness.ranks import RankPools


def pytest_configure() -> None:
    """Workers of pytest-xdist share the cores: more threads than cores wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A set's order differs from process to process, and workers must collect the same tests in one order."""
    for marker in metafunc.definition.iter_markers("parametrize"):
        if any(
            isinstance(values, (set, frozenset)) for values in (*marker.args[1:2], *marker.kwargs.values())
        ):
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid} is parametrized by a set, whose order differs between processes; "
                "give a tuple or sorted(...)"
            )


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPools]:
    """ranks(world_size, fn, *args, timeout_s=60): call a module-level function in every rank."""
    pools = RankPools(tmp_path_factory.mktemp("ranks"))
    try:
        yield pools
    finally:
        pools.close()
