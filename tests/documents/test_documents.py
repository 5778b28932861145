"""README and docs: their programs are the files of examples/, their commands and links exist."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pypar.cli import main
from pypar.mesh import parse_mesh
from pypar.train.config import load_config
from tests import ROOT
from tests.documents.blocks import BLOCKS, DOCUMENTS, EXAMPLES, PROGRAMS, Block, blocks_of, how_to_run

SHOWN = ("python", "toml", "yaml", "cpp")  # of these languages every block is a file, or a part of one
COMMANDS = [block for block in BLOCKS if block.language == "bash" and not block.title]


def differs_from_its_file(block: Block, root: Path = ROOT) -> str | None:
    """A block of examples/ is the whole file; of another file it is a part, in whole lines."""
    if not block.title:
        return (
            f'{block} shows {block.language} of no file; put it into examples/ and give the block title="..."'
        )
    path = root / block.title
    if not path.is_file():
        return f"{block} shows {block.title}, which is not there"
    text = path.read_text(encoding="utf-8").rstrip("\n")
    if block.title.startswith("examples/"):
        return None if block.text == text else f"{block} differs from {block.title}"
    return None if f"\n{block.text}\n" in f"\n{text}\n" else f"{block} is no part of {block.title}"


def test_every_program_is_a_file() -> None:
    shown = [block for block in BLOCKS if block.language in SHOWN or block.title]
    assert not [fault for block in shown if (fault := differs_from_its_file(block)) is not None]


def test_a_program_that_differs_is_found(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "x.py").write_text("import torch\nprint(1)\n")
    fences = [
        '```python title="examples/x.py"\nimport torch\nprint(2)\n```',
        '- A\n\n    ```python title="x.md"\n    A\n    ```',
        "```python\nprint(3)\n```",
    ]
    (tmp_path / "x.md").write_text("\n\n".join(["A", *fences]) + "\n")
    changed, part, nameless = blocks_of(tmp_path / "x.md")
    assert "differs from examples/x.py" in (differs_from_its_file(changed, tmp_path) or "")
    assert differs_from_its_file(part, tmp_path) is None
    assert "shows python of no file" in (differs_from_its_file(nameless, tmp_path) or "")


def test_every_example_is_shown_somewhere() -> None:
    titles = {block.title for block in BLOCKS}
    assert not [path.name for path in EXAMPLES if f"examples/{path.name}" not in titles and path.is_file()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_says_how_it_is_run(program: Path) -> None:
    words = how_to_run(program)
    assert words[0] in ("python", "torchrun")
    assert words[-1] == program.name


# ---- commands


def fault_of(words: list[str]) -> str | None:
    """What is wrong with a command, as far as that can be told without running it."""
    program, *arguments = words
    if program == "make":
        return fault_of_make(arguments)
    if program == "pypar":
        return fault_of_pypar(arguments)
    if program == "torchrun" and "-m" in arguments:
        where = arguments.index("-m")
        return (
            fault_of_pypar(arguments[where + 2 :])
            if arguments[where + 1] == "pypar.cli"
            else "another module"
        )
    if program == "torchrun":
        expected = how_to_run(ROOT / arguments[-1])[:-1] if (ROOT / arguments[-1]).is_file() else None
        return None if words[:-1] == expected else f"{arguments[-1]} is run as {expected}"
    if program == "python":
        return fault_of_bench(ROOT / arguments[0], arguments[1:])
    return None if words == ["pip", "install", "."] else "no command that this test knows"


def fault_of_make(arguments: list[str]) -> str | None:
    text = (ROOT / "Makefile").read_text()
    targets = [word for word in arguments if "=" not in word]
    unknown = [target for target in targets if not re.search(rf"^{target}:", text, re.M)]
    variables = [word.partition("=")[0] for word in arguments if "=" in word]
    unknown += [name for name in variables if not re.search(rf"^{name} \?=", text, re.M)]
    return f"the Makefile has no {', '.join(unknown)}" if unknown else None


def fault_of_pypar(arguments: list[str]) -> str | None:
    command = importlib.import_module(f"pypar.cli.{arguments[0]}")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    try:
        given = parser.parse_args(arguments[1:])
        if arguments[0] == "train":
            path = (
                given.config
                and (ROOT if given.config.parts[0] == "examples" else ROOT / "examples") / given.config
            )
            config = load_config(path, given.set, {"mesh": given.mesh} if given.mesh else {})
            parse_mesh(config.mesh)
    except (SystemExit, ValueError) as error:
        return str(error)
    return None


def fault_of_bench(program: Path, arguments: list[str]) -> str | None:
    if not program.is_file():
        return f"{program} is not there"
    sources = [program, *(ROOT / "pypar" / "bench").glob("*.py"), ROOT / "pypar" / "selftest" / "compare.py"]
    text = "".join(source.read_text() for source in sources)
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in text]
    return f"{program.name} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_can_be_given(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    faults = {shlex.join(words): fault for words in block.commands if (fault := fault_of(words)) is not None}
    assert not faults


@pytest.mark.parametrize(
    "line",
    [
        "make tests",
        "make test SPEED=1",
        "pypar train --meshes tp=2",
        "pypar train --set train.stepz=3",
        "pypar train --mesh xp=2",
        "python bench/attention.py --quickly",
        "python bench/nothing.py",
        "torchrun --nproc-per-node 3 examples/llama_on_a_mesh.py",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert fault_of(shlex.split(line))


def test_pictures_of_schedules_are_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [words for block in COMMANDS for words in block.commands if words[:2] == ["pypar", "schedule"]]
    assert drawn
    monkeypatch.chdir(tmp_path)
    tables = []
    for words in drawn:
        assert main(words[1:]) == 0
        out = capsys.readouterr().out
        assert "bubble" in out if words[2:] else "one_f_one_b: " in out  # without a name all are listed
        tables += [out] if "--all" in words else []
    assert any(f"```\n{table}```" in (ROOT / "docs" / "pipeline.md").read_text() for table in tables)
    assert (tmp_path / "schedules.svg").read_text() == (ROOT / "docs" / "schedules.svg").read_text()


# ---- recipes


def test_recipes_for_clusters_give_a_command_that_pypar_takes() -> None:
    yaml = pytest.importorskip("yaml")
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    slurm = shlex.split(script.read_text().replace("\\\n", " ").rpartition("srun ")[2])
    for words in (container["command"], slurm):
        assert words[words.index("-m") + 1] == "pypar.cli"
        assert fault_of(words) is None


def test_the_workflow_calls_what_ci_runs_anywhere() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["lint-and-test"]
    assert [step["run"] for step in tested["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").is_file()
    assert any(runner.endswith("-arm") for runner in tested["strategy"]["matrix"]["runner"])


# ---- pages


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert not [link for link in local if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path: Path) -> None:
    """x stands for the reader's own operator or method."""
    folders = "csrc|kernels|pypar|tests|bench|docs|examples|build"
    named = re.findall(rf"`((?:{folders})/[^`\s]*)`", path.read_text(encoding="utf-8"))
    placeholders = re.compile(r"<\w+>|\b(test_)?x(\.\w+|/)$|^build/")
    assert not [
        name for name in named if not placeholders.search(name) and not any(ROOT.glob(name.rstrip("/")))
    ]


def test_documents_speak_of_the_project_alone() -> None:
    for path in DOCUMENTS:
        assert not re.search(r"/work/|/tmp/|/root/|/home/", path.read_text(encoding="utf-8")), path


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1100


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_the_reference_names_what_there_is() -> None:
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    names = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    assert len(names) > 30
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            assert hasattr(importlib.import_module(module), last), f"the API reference names {name}"


@pytest.mark.slow  # the pages need mkdocs, which `make docs` installs and `make test` does not
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "site" / "api" / "attention.html").is_file()
