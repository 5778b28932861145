"""Classes that stand in for a module's class: a subclass of the same name, with some members of its own.

A module's class is what is changed, not its functions: copies, hooks, torch.compile and what else goes by a module's
class or its `forward` find an ordinary class, whose instances are instances of the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ORIGINAL, _MADE_BY = "_pypar_original", "_pypar_made_by"


@functools.cache
def substitute(original: Any, make: Callable[..., dict[str, Any]], *given: Any) -> Any:
    """The subclass of a class with the members make(original, *given); the same one for every call.

    make: a function of a module, so that copies and pickles of instances find it.
    """
    members = {
        **make(original, *given),
        _ORIGINAL: original,
        _MADE_BY: make,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": lambda self, protocol: (_empty, (original, make, *given), vars(self)),
        "computes_as": getattr(original, "computes_as", original),  # what pypar.parallel asks of a subclass
    }
    return type(original.__name__, (original,), members)


def _empty(original: Any, make: Callable[..., dict[str, Any]], *given: Any) -> Any:
    """An empty instance, for copies and pickles: the class itself stands in no module."""
    return object.__new__(substitute(original, make, *given))


def original_of(cls: Any, make: Callable[..., dict[str, Any]]) -> Any:
    """The class for which `make` made this one; None where it did not."""
    return cls._pypar_original if vars(cls).get(_MADE_BY) is make else None
