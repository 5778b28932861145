"""The package as such: what `import pypar` loads and offers, and how setup.py builds the native module."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pypar
from tests import ROOT


def load_setup() -> ModuleType:
    """setup.py as a module; it calls setup() only when it is the main program."""
    spec = importlib.util.spec_from_file_location("pypar_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_import_is_light():
    code = "import sys, pypar; print(*[m for m in ('torch', 'numpy', 'pypar._native') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )


@pytest.mark.parametrize("name", pypar.__all__)
def test_public_name_is_there(name):
    assert getattr(pypar, name) is not None
    assert name in dir(pypar)


def test_public_names_are_the_objects_that_they_name():
    from pypar.mesh import Mesh
    from pypar.ops import attention

    assert pypar.Mesh is Mesh
    assert pypar.attention is attention and callable(attention)


def test_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="no attribute 'atention'; it has .*attention"):
        pypar.atention  # noqa: B018


def test_type_checkers_see_the_names_that_run_time_sees():
    tree = ast.parse((ROOT / "pypar" / "__init__.py").read_text())
    seen = {
        alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen - {None} == set(pypar.__all__) - {"__version__"}


def test_version_is_the_distributions():
    assert importlib.metadata.version("pypar-torch") == pypar.__version__


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py would be missing in the wheel."""
    for module in (ROOT / "pypar").rglob("*.py"):
        assert (module.parent / "__init__.py").is_file(), f"{module.parent} lacks __init__.py"
    assert [path for path in (ROOT / "kernels").rglob("*.py") if path.parent != ROOT / "kernels"] == []


# --- setup.py


def fake_compiler(folder: Path, macros: str) -> str:
    """A program that answers the question for predefined macros as a compiler with these would."""
    program = folder / "c++"
    program.write_text(
        "#!/bin/sh\n" + "\n".join(f"echo '#define {macro}'" for macro in macros.split(";")) + "\n"
    )
    program.chmod(0o755)
    return str(program)


def test_no_compiler_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match=r"no C\+\+ compiler found: .* apt install g\+\+"):
        load_setup().find_compiler()


def test_missing_compiler_named_by_cxx_is_a_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "nowhere++ -m64")
    with pytest.raises(Exception, match=r"nowhere\+\+ is not on PATH"):
        load_setup().find_compiler()


def test_cxx_may_hold_options_and_a_cache(monkeypatch):
    monkeypatch.setenv("CXX", "env g++ -pipe")
    assert load_setup().find_compiler() == ["env", "g++", "-pipe"]


def test_first_compiler_on_path_is_taken(monkeypatch, tmp_path):
    fake_compiler(tmp_path, "__GNUC__ 12")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_setup().find_compiler() == ["c++"]


@pytest.mark.parametrize(
    ("macros", "sentence"),
    [
        ("__GNUC__ 9;__x86_64__ 1", "is GCC 9, pypar needs GCC >= 10"),
        ("__GNUC__ 4;__clang__ 1;__clang_major__ 10;__x86_64__ 1", "is clang 10, pypar needs .* clang >= 11"),
        ("__GNUC__ 12;__riscv 1", "an architecture other than x86_64 and aarch64"),
    ],
)
def test_compiler_that_cannot_build_it_is_a_sentence(tmp_path, macros, sentence):
    with pytest.raises(Exception, match=sentence):
        load_setup().find_arch([fake_compiler(tmp_path, macros)])


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_arch_is_the_compilers_not_the_machines(tmp_path, arch):
    compiler = fake_compiler(tmp_path, f"__GNUC__ 4;__clang__ 1;__clang_major__ 19;__{arch}__ 1")
    assert load_setup().find_arch([compiler]) == arch


SMALL_OPERATOR = """
#include "NAME.h"
#ifndef PYPAR_BINDING
namespace PYPAR_ISA {
int NAME() { return NAME_value; }
}
#endif
"""
SMALL_MODULE = """
#include <pybind11/pybind11.h>
namespace ISA {
int one();
}
PYBIND11_MODULE(_native, m) { m.def("one", &ISA::one); }
"""


@pytest.fixture(scope="module")
def built_tree(tmp_path_factory) -> Path:
    """What setup.py needs, with two small operators in place of csrc's, one of them in a folder, built once."""
    tree = tmp_path_factory.mktemp("small")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for package in ("pypar", "kernels", "csrc"):
        (tree / package).mkdir()
    shutil.copy(ROOT / "pypar" / "__init__.py", tree / "pypar")
    shutil.copy(ROOT / "kernels" / "__init__.py", tree / "kernels")
    (tree / "csrc" / "inner").mkdir()
    for name in ("one", "inner/two"):
        text = SMALL_OPERATOR.replace("NAME.h", f"{name}.h").replace("NAME", name[-3:])
        (tree / "csrc" / f"{name}.h").write_text(f"constexpr int {name[-3:]}_value = 1;\n")
        (tree / "csrc" / f"{name}.cpp").write_text(text)
    setup = load_setup()
    isa = next(iter(setup.ISA_FLAGS[setup.find_arch(setup.find_compiler())]))
    (tree / "csrc" / "module.cpp").write_text(SMALL_MODULE.replace("ISA", isa))
    assert len(build(tree)) > 1
    return tree


@pytest.fixture
def small_tree(built_tree, tmp_path) -> Path:
    """A copy of the built tree that a test may change; objects keep their time stamps."""
    return Path(shutil.copytree(built_tree, tmp_path / "small"))


def run_setup(tree: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    flags = os.environ | {"CXXFLAGS": "-O0"}  # of pybind11's headers, which take the time
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=flags)


def build(tree: Path) -> set[str]:
    """Builds the native module of `tree` into tree/out and returns the names of what was written newly."""
    before = {path: path.stat().st_mtime_ns for path in tree.glob("build/*/**/*.*o")}
    result = run_setup(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.name for path in tree.glob("build/*/**/*.*o") if before.get(path) != path.stat().st_mtime_ns}


def test_built_module_loads_and_needs_no_torch(small_tree):
    code = "import sys; from pypar import _native; print(_native.one(), 'torch' in sys.modules)"
    target = small_tree / "out" / "pypar"
    shutil.copy(small_tree / "pypar" / "__init__.py", target)
    result = subprocess.run([sys.executable, "-c", code], cwd=target.parent, capture_output=True, text=True)
    assert result.stdout.split() == ["1", "False"], result.stderr


def test_second_build_compiles_nothing(small_tree):
    assert build(small_tree) == set()


def test_changed_header_recompiles_what_includes_it(small_tree):
    (small_tree / "csrc" / "inner" / "two.h").write_text("constexpr int two_value = 22;\n")
    written = build(small_tree)
    assert {name for name in written if name.endswith(".o")} == {
        path.name for path in small_tree.glob("build/*/inner/two.*.o")
    }
    assert any(name.startswith("_native.") for name in written)


def test_deleted_source_leaves_the_module(small_tree):
    (small_tree / "csrc" / "inner" / "two.cpp").unlink()
    build(small_tree)
    assert "two" not in next(small_tree.glob("build/*/build.ninja")).read_text()


def test_every_operator_is_compiled_once_per_instruction_set_lowest_first():
    """The linker keeps the first copy of a header's inline function, and that one must run everywhere."""
    setup = load_setup()
    for arch, isas in setup.ISA_FLAGS.items():
        text = setup.ninja_text(["g++"], arch, "_native.so")
        linked = next(
            line for line in text.splitlines() if line.startswith("build _native.so: link")
        ).split()[3:]
        paths = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cpp")]
        sources = sorted(str(path.with_suffix("")) for path in paths)
        texts = {s: (ROOT / "csrc" / f"{s}.cpp").read_text() for s in sources}
        bound = [s for s in sources if s == "module" or "PYPAR_BIND(" in texts[s]]
        bindings, kernels = linked[: len(bound)], linked[len(bound) :]
        assert [name.split(".")[0] for name in bindings] == bound
        words = {isa: setup.ISA_WORD.get(isa, "") for isa in isas}
        del texts["module"]
        assert kernels == [f"{s}.{isa}.o" for isa in isas for s in texts if words[isa] in texts[s]]


def test_failing_compiler_is_an_error(small_tree):
    (small_tree / "csrc" / "one.h").write_text("constexpr int one_value = missing;\n")
    result = run_setup(small_tree)
    assert result.returncode != 0
    assert "missing" in result.stdout and "the native build failed" in result.stderr
