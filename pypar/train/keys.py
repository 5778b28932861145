"""Every key of a configuration as a page of tables: what `pypar train --keys` prints, and docs/configuration.md."""

import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterable
from typing import Any

from pypar.models.families import FAMILIES
from pypar.settings import Key, keys_of
from pypar.train.config import RunConfig

MODEL = "model"  # the section whose keys are a family's
HEAD = """# Configuration

Every key of a run, as `pypar train --keys` writes it from the fields of the code. A file names what differs from the
defaults ([Training](training.md)), and `--set section.key=value` overrides it. A value that breaks a rule is refused
before a rank is started.
"""


def page() -> str:
    """Markdown: a heading, what the section is about, and a table of its keys, for each section."""
    kinds = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    parts = [HEAD]
    for name, keys in itertools.groupby(keys_of(RunConfig), lambda key: key.name.rpartition(".")[0]):
        parts.append(_table(f"## `[{name}]`" if name else "## Top level", kinds.get(name, RunConfig), keys))
        if name == MODEL:
            others = [(family, section) for family, section in FAMILIES.items() if section is not kinds[name]]
            for family, section in others:
                heading = f'## `[{name}]` with `family = "{family}"`'
                parts.append(_table(heading, section, keys_of(section, f"{name}.")))
    return "\n".join(parts)


def _table(heading: str, kind: Any, keys: Iterable[Key]) -> str:
    about = (inspect.getdoc(kind) or "").splitlines()[0].replace("``", "`")
    table = ["| Key | Default | Values | What it says |", "|---|---|---|---|", *map(_row, keys)]
    return "\n\n".join([heading, about, "\n".join(table)]) + "\n"


def _row(key: Key) -> str:
    leaf = key.name.rpartition(".")[2]
    return f"| `{leaf}` | `{json.dumps(key.default)}` | {key.values()} | {key.rule.help} |"
