"""Names of a package that are loaded when they are first used, so that its light parts cost no import of torch."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def loader(
    package: str, home_of_name: Mapping[str, str], names: Sequence[str] | None = None
) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a package whose names are defined in other modules: name -> module.

    The next use of a name is a plain attribute of the package. ``names`` are those that the error of an unknown one
    lists, where the package has more.
    """

    def load(name: str) -> Any:
        if name not in home_of_name:
            known = ", ".join(sorted(names or home_of_name))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        value = getattr(importlib.import_module(home_of_name[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
