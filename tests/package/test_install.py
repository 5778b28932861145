"""What a user gets: wheel and sdist, built in isolation, installed and used elsewhere.

The quick tests take over the objects that were compiled when this tree was set up, if they are there and fit: ninja
decides. The long ones compile everything anew, from a clean tree and from the sdist.
"""

import email
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import pypar
from tests import ROOT

BUILD_INPUTS = (
    "csrc",
    "kernels",
    "pypar",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
MODULE = f"pypar/_native{sysconfig.get_config_var('EXT_SUFFIX')}"

USE = """
import os
import torch

import pypar

generator = torch.Generator().manual_seed(0)
q_BTNH = torch.randn(2, 63, 4, 32, generator=generator)
k_BSGH, v_BSGH = (torch.randn(2, 63, 2, 32, generator=generator) for _ in range(2))
want = pypar.attention(q_BTNH, k_BSGH, v_BSGH, causal=True, backend="reference")
# A named backend that cannot run is an error: this is the native one. It is also what pypar chooses unasked.
native = pypar.attention(q_BTNH, k_BSGH, v_BSGH, causal=True, backend="native")
chosen = pypar.attention(q_BTNH, k_BSGH, v_BSGH, causal=True)
torch.testing.assert_close(native, want, rtol=1e-5, atol=1e-5)
assert torch.equal(native, chosen)
from pypar import _native, kernels
print(pypar.__version__)
for module in (pypar, _native, kernels):
    print(os.path.realpath(module.__file__))
"""


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Runs `command` and returns what it printed; its failure fails the test with all of that."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    no_input = subprocess.DEVNULL
    result = subprocess.run(
        command, cwd=cwd, env=env, stdin=no_input, capture_output=True, text=True, timeout=600
    )
    if result.returncode != 0:
        output = result.stdout + result.stderr
        hint = ""
        if "No matching distribution found" in output or "Could not find a version" in output:
            hint = "pip cannot fetch setuptools, pybind11 and ninja for the build: is its index reachable?\n"
        pytest.fail(f"{hint}{' '.join(command)} ended with {result.returncode}:\n{output}")
    return result.stdout


def pip_wheel(source: Path, target: Path, **env: str) -> Path:
    """Builds a wheel of `source`, a tree or an sdist, into `target`, with build isolation as for a user.

    Without the GPU's kernels, which take minutes: tests/gpu/test_build.py looks after these.
    """
    options = ["--no-deps", "--no-cache-dir", "--wheel-dir", str(target)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(source)], target.parent, PYPAR_CUDA="0", **env)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory) -> Path:
    """The sources as in a clean clone: nothing built, no caches."""
    return copy_of_sources(tmp_path_factory.mktemp("clean") / "clone")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources and the objects of pypar._native."""
    tree = copy_of_sources(tmp_path_factory.mktemp("built") / "clone")
    for folder in (ROOT / "build").glob(f"linux-{platform.machine()}"):
        shutil.copytree(folder, tree / "build" / folder.name)
    return tree


def copy_of_sources(tree: Path) -> Path:
    tree.mkdir()
    unbuilt = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for path in (ROOT / name for name in BUILD_INPUTS):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=unbuilt)
        elif path.exists():
            shutil.copy(path, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return pip_wheel(tree, tmp_path_factory.mktemp("dist") / "wheel")


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", code, str(target)], tree)
    (archive,) = target.glob("*.tar.gz")
    return archive


def modules_of(tree: Path) -> set[str]:
    """The Python files of the package as they are named in a wheel."""
    rooms = {str(path.relative_to(tree)) for path in tree.glob("pypar/**/*.py")}
    return rooms | {f"pypar/{path.relative_to(tree)}" for path in tree.glob("kernels/*.py")}


def test_wheel_runs_native_attention_away_from_the_sources(wheel, tmp_path):
    check_use(wheel, tmp_path)


@pytest.mark.slow  # compiles everything
def test_wheel_of_a_clean_tree_is_the_same_and_runs(clean_tree, wheel, tmp_path):
    whole = pip_wheel(clean_tree, tmp_path / "wheel")
    assert whole.name == wheel.name
    assert set(zipfile.ZipFile(whole).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    check_use(whole, tmp_path)


def check_use(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    )
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        tmp_path,
    )
    # The dependencies are those of this environment: a line in a .pth file appends its folder to sys.path,
    # and an editable pypar there stays out of sight.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    version, *files = run([str(python), "-I", "-c", USE], tmp_path).split()
    assert version == pypar.__version__
    for file in files:
        assert Path(file).is_relative_to(site.resolve()), f"{file} is not of the installed wheel"


def test_wheel_holds_the_package_and_nothing_else(wheel, tree):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == modules_of(tree) | {MODULE, "pypar/py.typed"}


def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


def test_wheel_metadata(wheel):
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("pypar-torch", pypar.__version__)
    assert (found["License-Expression"], found["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    needed = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert "torch>=2.6" in needed
    assert not any(line.startswith("triton") for line in needed)
    archive = zipfile.ZipFile(wheel)
    (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "pypar = pypar.cli:main" in archive.read(scripts).decode()


def test_native_module_links_neither_torch_nor_openmp(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract(MODULE, tmp_path)
    needed = run(["objdump", "-p", str(tmp_path / MODULE)], tmp_path)
    libraries = [line.split()[1] for line in needed.splitlines() if line.split()[:1] == ["NEEDED"]]
    assert {name.split(".so")[0] for name in libraries} <= {
        "libc", "libgcc_s", "libm", "libpthread", "libstdc++", "ld-linux-x86-64", "ld-linux-aarch64"
    }  # fmt: skip


def test_sdist_holds_what_a_build_needs(sdist, tree):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    inputs = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    generated = {name for name in inputs if name.startswith("build/") or ".egg-info/" in name}
    assert inputs - generated <= names
    assert not any(name.startswith(("tests/", "bench/", "build/")) for name in names)


@pytest.mark.slow  # a second whole build
def test_wheel_from_sdist_is_the_wheel_from_the_tree(sdist, wheel, tmp_path):
    # Without optimisation: this asks whether the sdist is complete, not whether its code is fast.
    second = pip_wheel(sdist, tmp_path / "wheel", CXXFLAGS="-O0")
    assert second.name == wheel.name
    assert set(zipfile.ZipFile(second).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    assert metadata(second).items() == metadata(wheel).items()
