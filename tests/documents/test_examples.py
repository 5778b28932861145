"""The programs of examples/ and the commands of docs/ run, on as many ranks as they say."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.documents.blocks import BLOCKS, PROGRAMS, num_ranks
from tests.harness.small_run import SMALL, set_arguments

Run = Callable[[Path, int], dict]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(program, ranks) -> {"codes", "output"}; tests/documents/example_ranks.py does it."""
    command = [sys.executable, str(ROOT / "tests" / "documents" / "example_ranks.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdin is not None and server.stdout is not None

    def ask(program: Path, ranks: int) -> dict:
        folder = tmp_path_factory.mktemp(program.stem)
        server.stdin.write(json.dumps({"path": str(program), "ranks": ranks, "folder": str(folder)}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that runs the examples has ended"
        return json.loads(answer)

    yield ask
    server.kill()  # between two programs: nothing is lost, and it need not unload its libraries
    server.communicate()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_it_runs(program: Path, run: Run) -> None:
    answer = run(program, num_ranks(program))
    assert answer["codes"] == [0] * num_ranks(program), answer["output"]


def test_a_rank_that_fails_is_seen(tmp_path: Path, run: Run) -> None:
    program = tmp_path / "fails.py"
    program.write_text("import os\nassert os.environ['RANK'] == '0', 'not this one'\n")
    answer = run(program, 2)
    assert answer["codes"] == [0, 1]
    assert "not this one" in answer["output"]


@pytest.mark.slow  # each rank loads torch and transformers anew; this shows that forks stand for torchrun rightly
@pytest.mark.parametrize("name", ["llama_on_a_mesh", "long_llama", "ring_attention"])
def test_it_runs_under_torchrun(name: str, tmp_path: Path) -> None:
    program = ROOT / "examples" / f"{name}.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks(program)), str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the documents find the texts that they name."""
    place = tmp_path_factory.mktemp("commands")
    (place / "books").mkdir()
    (place / "corpus").mkdir()
    text = "".join(f"def f{i}(x): return x + {i}\n" for i in range(2000))
    (place / "books" / "a.txt").write_text(text)
    (place / "corpus" / "a.txt").write_text(text)
    (place / "examples").symlink_to(ROOT / "examples")
    return place


@pytest.mark.slow  # starts ranks for each command
@pytest.mark.parametrize("document", ["docs/training.md", "docs/long_sequences.md", "docs/pipeline.md"])
def test_commands_of_a_page_run_in_their_order(document: str, place: Path) -> None:
    commands = [words for b in BLOCKS if b.document == document and b.is_run for words in b.commands]
    assert commands
    for index, words in enumerate(words for words in commands if words[0] == "pypar"):
        arguments = words[1:]
        if arguments[0] == "train":
            # The same command, a small model.
            small = SMALL | {"train.steps": 2 + index, "train.final_evaluate_batches": 2}
            small |= {"data.cache_directory": place / "cache"}
            small |= {} if "--data" in arguments else {"data.path": place / "corpus"}
            small |= {} if "examples/run.toml" in arguments else {"name": f"{Path(document).stem}-{index}"}
            arguments = arguments + set_arguments(small)
        command = [sys.executable, "-m", "pypar.cli", *arguments]
        result = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
