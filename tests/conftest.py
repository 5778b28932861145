"""Fixtures of the whole suite."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves this folder out

from ranks import RankPools


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPools]:
    """ranks(world_size, fn, *args, timeout_s=60): call a module-level function in every rank."""
    pools = RankPools(tmp_path_factory.mktemp("ranks"))
    try:
        yield pools
    finally:
        pools.close()
