"""Every method of context parallelism by its name: the order in which lists show them."""

from __future__ import annotations

import functools

from pypar.context_parallel.call import Method
from pypar.ops.backend import unknown_name
from pypar.ops.uncompiled import uncompiled


@uncompiled("it imports modules")
@functools.cache
def methods() -> dict[str, Method]:
    """Name -> method. A new one is a line here."""
    from pypar.context_parallel.auto.choose import auto
    from pypar.context_parallel.methods.all_gather import all_gather
    from pypar.context_parallel.methods.hybrid import hybrid
    from pypar.context_parallel.methods.ring.method import ring
    from pypar.context_parallel.methods.ulysses import ulysses

    return {"all_gather": all_gather, "auto": auto, "hybrid": hybrid, "ring": ring, "ulysses": ulysses}


def method_named(name: str) -> Method:
    """ValueError when there is none of that name."""
    if name not in methods():
        raise ValueError(unknown_name("method", name, sorted(methods()), "ring attention: "))
    return methods()[name]
