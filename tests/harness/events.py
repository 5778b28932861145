"""What happens in which order, for tests of overlap."""

from collections.abc import Callable
from typing import Any


def note(events: list[str], word: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which also appends the word to the events when it is called."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(word)
        return function(*args, **kwargs)

    return noted
