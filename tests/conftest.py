"""Fixtures of the whole suite. torch is imported where it is used: what gives the tests to workers needs none of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import ROOT

if TYPE_CHECKING:
    from tests.harness.ranks import RankPools


def pytest_configure() -> None:
    """Workers of pytest-xdist share the cores: more threads than cores wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The hundreds of tests of names and structure, which take no time, come last: a long one there ends alone."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid} is named by an address, which differs between processes; give its values names"
            )
    items.sort(key=lambda item: item.path.parent == ROOT / "tests")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPools]:
    """ranks(world_size, fn, *args, timeout_s=60): call a module-level function in every rank."""
    from tests.harness.ranks import RankPools

    pools = RankPools(tmp_path_factory.mktemp("ranks"))
    try:
        yield pools
    finally:
        pools.close()
