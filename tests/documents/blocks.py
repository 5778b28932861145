"""The fenced blocks of README.md, CONTRIBUTING.md and docs/, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run here:"
_FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?$')


@dataclass(frozen=True)
class Block:
    """title: the file that the block shows, "" where it shows none. is_run: no comment NOT_RUN stands before it."""

    document: str
    line: int
    language: str
    title: str
    text: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks_of(path: Path) -> Iterator[Block]:
    """ValueError for a fence that this file does not understand, or that is not closed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    before, number = "", 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if line.lstrip().startswith("```"):
            opening = _FENCE.match(line)
            if opening is None:
                raise ValueError(
                    f'{path.name}:{number}: {line!r} is not ```language or ```language title="file"'
                )
            indent, language, title = opening.groups()
            end = lines.index(f"{indent}```", number)
            text = "\n".join(inner.removeprefix(indent) for inner in lines[number:end])
            name = str(path.relative_to(ROOT)) if ROOT in path.parents else path.name
            yield Block(name, number, language, title or "", text, not before.strip().startswith(NOT_RUN))
            number = end + 1
        before = line


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PROGRAMS = [path for path in EXAMPLES if path.suffix == ".py"]


def how_to_run(program: Path) -> list[str]:
    """The command that stands at the end of a program's docstring: torchrun or python."""
    first = program.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    return shlex.split(first.rpartition(": ")[2])


def num_ranks(program: Path) -> int:
    words = how_to_run(program)
    return int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1
