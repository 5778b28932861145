"""Names of a package that are loaded when they are first used, so that its light parts cost no import of torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loader(package: str, home_of_name: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a package whose names are defined in other modules: name -> module.

    The next use of a name is a plain attribute of the package.
    """

    def load(name: str) -> Any:
        if name not in home_of_name:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home_of_name[name]), name)
        setattr(importlib.import_module(package), name, value)
        return value

    return load
