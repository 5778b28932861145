"""The sentences with which calls are refused."""

from collections.abc import Callable

import pytest


def sentences(*calls: Callable[[], object]) -> list[str]:
    """What each call says in the ValueError that it raises."""
    said = []
    for call in calls:
        with pytest.raises(ValueError) as refused:
            call()
        said.append(str(refused.value))
    return said
