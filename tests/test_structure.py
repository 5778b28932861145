"""The structure of the project: which room imports which, lengths of files, what is packaged, names."""

import ast
import functools
import re
import runpy
import sys
from collections import Counter

import pytest
import setuptools

from pypar.ops.backend import op_modules
from tests import ROOT

PACKAGE = ROOT / "pypar"

# A room imports itself and rooms of lower levels. Rooms of one level import each other only at BASE.
BASE, WINGS = 2, 3
ORDER = (
    ("kernels", "_native", "settings", "lazy", "grid", "spans", "arenas"),
    ("files", "ops", "mesh_shape"),
    (
        "comm",
        "mesh",
        "axis",
        "layout",
        "blocks",
        "owned",
        "role",
        "sequences",
        "sharded",
        "cost",
        "recomputation",
    ),
    ("tensor_parallel", "context_parallel", "pipeline_parallel", "data_parallel", "optimizers"),
    ("models", "parallel"),
    ("hugging_face", "train", "doctor"),
    ("bench",),
    ("selftest",),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

MAX_LINES = {".py": 300, ".cpp": 500, ".h": 500, ".cu": 500, ".cuh": 500}
SOURCE_FOLDERS = ("pypar", "kernels", "csrc", "tests", "bench", "examples")
BANNED_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "v2"}


def _level(room):
    return LEVELS.get(room)


def _sources(*suffixes):
    files = [path for folder in SOURCE_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in [ROOT / "setup.py", *files] if path.suffix in suffixes]


@functools.cache  # a second for all of them, which several tests look through
def _tree(path):
    return ast.parse(path.read_text())


def _imported_modules(path):
    """Full names of what a file imports; `from pypar import x` gives pypar.x."""
    package = ("pypar", *path.relative_to(PACKAGE).parts[:-1]) if PACKAGE in path.parents else ()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _room(module):
    """The room of a module's full name; None outside pypar and for names that pypar itself defines."""
    parts = module.split(".")
    if parts[0] != "pypar" or len(parts) == 1 or parts[1] in ("__version__",):
        return None
    return parts[1]


def _room_of_file(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOM_FILES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem != "__init__"
]


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = _room_of_file(path)
    assert _level(room) is not None, f"the room {room!r} has no level; the design says where it belongs"
    for imported in filter(None, map(_room, _imported_modules(path))):
        level = _level(imported)
        assert level is not None, f"{path} imports pypar.{imported}, which is no room"
        allowed = imported == room or level < _level(room) or level == _level(room) == BASE
        assert allowed, f"{path} is in {room} and must not import pypar.{imported}"


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_absolute(path):
    """kernels/ is a folder of its own that imports its neighbours, and is not among these files."""
    if path.is_relative_to(PACKAGE / "kernels"):
        return
    relative = [
        ast.unparse(node) for node in ast.walk(_tree(path)) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, f"{path.relative_to(ROOT)} says {relative}: write the full name, from pypar on"


def test_the_rule_of_imports_sees_what_it_must(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        "from pypar import train\ndef f():\n    import pypar.cli.main\nfrom pypar.ops.linear import linear"
    )
    assert [_room(module) for module in _imported_modules(source)] == ["train", "ops", "cli"]
    assert _level("tensor_parallel") == _level("data_parallel") == WINGS


def test_triton_kernels_are_flat_and_import_torch_and_triton_only():
    assert not list((ROOT / "kernels").glob("*/*.py"))
    own = {path.stem for path in (ROOT / "kernels").glob("*.py")}  # imported as `from .x import y`
    allowed = {"torch", "triton", *own, *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for module in _imported_modules(path):
            assert module.split(".")[0] in allowed, f"{path} imports {module}"


def test_nobody_imports_the_kernels_folder_by_its_own_name():
    for path in _sources(".py"):
        assert "kernels" not in {module.split(".")[0] for module in _imported_modules(path)}, path


def test_an_operator_has_one_name_in_five_rooms():
    for module in op_modules():
        op, backends = module.__name__.rsplit(".", 1)[1], {backend.name for backend in module.BACKENDS}
        rooms = [f"pypar/ops/{op}", f"pypar/selftest/cases/{op}", f"tests/ops/test_{op}", f"bench/{op}"]
        rooms += [f"csrc/{op}"] if backends & {"native", "cuda"} else []
        rooms += [f"kernels/{op}"] if "triton" in backends else []
        for room in rooms:
            place = ROOT / room
            files = [path for path in place.parent.glob(f"{place.name}.*") if path.is_file()]
            of_several = place.parent / op  # such as tests/ops/attention
            assert files or of_several.is_dir(), f"the operator {op} has no {room}"


MAX_FILES = 14  # about a dozen


def test_folders_stay_small():
    """The folder carries what three files have in common, the files the idea."""
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        stems = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        name = str(folder.relative_to(ROOT))
        assert len(stems) <= MAX_FILES, (
            f"{name} has {len(stems)} files, at most {MAX_FILES}: some want a folder"
        )
        prefixes = Counter(stem.split("_")[0] for stem in stems)
        shared = [prefix for prefix, count in prefixes.items() if count >= 3]
        assert not shared, f"{name}: three files begin with {shared}"


def test_native_sources_include_no_torch_header():
    for path in _sources(".cpp", ".h", ".cu", ".cuh"):
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_native_code_gets_addresses_from_one_place():
    """native.run and native.address refuse tensors without memory; the others compare addresses, or divide one."""
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "data_ptr(" in path.read_text()
    }
    others = {
        "bench/gpu/moved.py",
        "bench/gpu/triton_code.py",
        "comm/between_hosts.py",
        "data_parallel/arrivals.py",
    }
    assert found == {"ops/native.py", *others}


def test_files_stay_short():
    lengths = {path: len(path.read_text().splitlines()) for path in _sources(*MAX_LINES)}
    too_long = [
        f"{path.relative_to(ROOT)} has {n} lines" for path, n in lengths.items() if n > MAX_LINES[path.suffix]
    ]
    assert not too_long, f"{'; '.join(too_long)}; at most {MAX_LINES}"


def test_native_folders_are_small_and_carry_the_prefix():
    for folder in [ROOT / "csrc", *(path for path in (ROOT / "csrc").rglob("*") if path.is_dir())]:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 12, (
            f"{folder.relative_to(ROOT)} has {len(files)} files: find the idea of a subfolder"
        )
        repeated = [path.name for path in files if f"_{folder.name}_" in f"_{path.stem}_"]
        assert not repeated, f"{repeated} repeat the name of their folder, {folder.relative_to(ROOT)}"


def test_packages_match_the_folders(monkeypatch):
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py", run_name="__main__")
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"pypar.kernels"}
    assert set(arguments["packages"]) == expected
    assert all((folder / "__init__.py").exists() for folder in (*folders, ROOT / "kernels"))


def _names(tree):
    """Every name that a file gives: of functions, classes, arguments, variables, attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _words(name):
    """The words of snake_case and CamelCase, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def test_banned_names():
    found = []
    for path in _sources(".py"):
        names = {path.stem, path.parent.name, *_names(_tree(path))}
        found += [
            f"{path.relative_to(ROOT)}: {name}" for name in sorted(names) if _words(name) & BANNED_WORDS
        ]
    for path in _sources(".cpp", ".h", ".cu", ".cuh"):
        found += [str(path.relative_to(ROOT))] if _words(path.stem) & BANNED_WORDS else []
    for path in [*(ROOT / "docs").rglob("*"), *(ROOT / "examples").iterdir()]:
        found += [str(path.relative_to(ROOT))] if _words(path.stem) & BANNED_WORDS else []
    assert not found, f"banned words in {found}: say what it is"


def test_words_of_a_name():
    assert _words("MeshManagerV2_for_utils") == {"mesh", "manager", "v2", "for", "utils"}


def test_a_room_does_not_repeat_its_name():
    for path in ROOM_FILES:
        room = _room_of_file(path)
        repeated = path.parent != PACKAGE and f"_{room}_" in f"_{path.stem}_"
        assert not repeated, f"{path.relative_to(ROOT)} repeats the name of its room"
