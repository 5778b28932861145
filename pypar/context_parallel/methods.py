"""Finds a method of context parallelism by its name. A file of this folder adds methods by defining METHODS."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from pypar.context_parallel.call import Method
from pypar.ops.backend import unknown_name
from pypar.ops.uncompiled import uncompiled


@uncompiled("it imports modules")
@functools.cache
def methods() -> dict[str, Method]:
    """Every method by its name: what the METHODS of this folder's files hold, name -> Method."""
    package = importlib.import_module("pypar.context_parallel")
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= getattr(module, "METHODS", {})
    return found


def method_named(name: str) -> Method:
    """ValueError when there is none of that name."""
    if name not in methods():
        raise ValueError(unknown_name("method", name, sorted(methods()), "ring attention: "))
    return methods()[name]
