"""Every key of a configuration as a page of tables: what `pypar train --keys` prints, and docs/configuration.md."""

import dataclasses
import inspect
import itertools
import json

from pypar.settings import Key, keys_of
from pypar.train.config import RunConfig

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
        heading = f"## `[{name}]`" if name else "## Top level"
        about = (inspect.getdoc(kinds[name] if name else RunConfig) or "").splitlines()[0].replace("``", "`")
        table = ["| Key | Default | Values | What it says |", "|---|---|---|---|", *map(_row, keys)]
        parts.append("\n\n".join([heading, about, "\n".join(table)]) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    leaf = key.name.rpartition(".")[2]
    return f"| `{leaf}` | `{json.dumps(key.default)}` | {key.values()} | {key.rule.help} |"
