"""Builds `pypar._native` from csrc/*.cpp with ninja: in parallel, incrementally, without torch.

Every csrc/<op>.cpp is compiled once per instruction set, without pybind11, with PYPAR_ISA naming the
namespace of its code, and once with PYPAR_BINDING, which holds the Python side; csrc/module.cpp is binding
only. The best instruction set is chosen at import. Objects stay in build/<platform>/, so that the next build,
also one by `pip install`, compiles only what changed. CXX, CPPFLAGS, CXXFLAGS and LDFLAGS are honoured.
"""

import fcntl
import filecmp
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
OLDEST_COMPILER = {"GCC": 10, "clang": 11}  # the first that know AVX-512-BF16 well
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -pthread"
)
AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# Poorest first, which is also the order of linking: where two objects hold the same inline function of a
# header, the linker keeps the first, and that one must run on every machine.
ISA_FLAGS = {
    "x86_64": {"baseline": "", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"},
    "aarch64": {"neon": ""},
}


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler: $CXX, else the first of g++, clang++ and c++ on PATH."""
    asked = os.environ.get("CXX", "").strip()
    command = shlex.split(asked) or [c for c in ("g++", "clang++", "c++") if shutil.which(c)][:1]
    if not command:
        raise PlatformError(
            "no C++ compiler found: neither g++, clang++ nor c++ is on PATH and CXX is not set; install one"
            " (Debian: apt install g++) or set CXX"
        )
    if shutil.which(command[0]) is None:
        raise PlatformError(
            f"CXX={asked}: {command[0]} is not on PATH; install it or set CXX to another compiler"
        )
    return command


def find_arch(compiler: list[str]) -> str:
    """Returns the architecture that `compiler` builds for, after checking that pypar supports both."""
    probe = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(
            f"`{shlex.join(probe)}` failed, set CXX to a C++ compiler that runs: {result.stderr}"
        )
    macros = dict(line.split(" ", 2)[1:] for line in result.stdout.splitlines() if line.count(" ") >= 2)
    kind, version = ("clang", "__clang_major__") if "__clang__" in macros else ("GCC", "__GNUC__")
    if int(macros.get(version, 0)) < OLDEST_COMPILER[kind]:
        raise PlatformError(
            f"{shlex.join(compiler)} is {kind} {macros.get(version, '(unknown)')}, pypar needs GCC >="
            f" {OLDEST_COMPILER['GCC']} or clang >= {OLDEST_COMPILER['clang']}; set CXX to a newer compiler"
        )
    for arch in ISA_FLAGS:
        if f"__{arch}__" in macros:
            return arch
    raise PlatformError(
        f"{shlex.join(compiler)} builds for an architecture other than {' and '.join(ISA_FLAGS)};"
        " set CXX to a compiler for one of them"
    )


def find_ninja() -> str:
    """Returns ninja's path: the build environment's own, which need not be on PATH, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""  # noqa: N806
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise PlatformError("ninja not found: build with isolation (`pip install .`) or `pip install ninja`")
    return found


def find_python_headers() -> str:
    """Returns the folder of Python.h."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise PlatformError(
            f"{folder}/Python.h not found: install this Python's headers (Debian: apt install python3-dev)"
        )
    return folder


def copy_pybind11_headers(target: Path) -> None:
    """Copies pybind11's headers to `target`, leaving alone what is equal.

    pip's isolated builds put pybind11 into a new folder each time: at a path of our own, with the time stamps
    kept, unchanged headers cause no rebuild.
    """
    import pybind11

    source = Path(pybind11.get_include())
    for header in source.rglob("*.h"):
        copy = target / header.relative_to(source)
        if not (copy.is_file() and filecmp.cmp(header, copy, shallow=False)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)


def ninja_text(compiler: list[str], arch: str, output: str) -> str:
    """Returns the text of build.ninja; paths are relative to its folder, build/<platform>/."""

    def joined(*names: str) -> str:
        words = [word for name in names for word in shlex.split(os.environ.get(name, ""))]
        return shlex.join(words).replace("$", "$$")

    cxx = shlex.join(compiler).replace("$", "$$")
    python_headers = shlex.quote(find_python_headers()).replace("$", "$$")
    lines = [
        f"cxx = {cxx}",
        f"cxx_flags = {CXX_FLAGS} -I../../csrc {joined('CPPFLAGS', 'CXXFLAGS')}",
        f"binding_flags = -DPYPAR_BINDING -isystem pybind11 -isystem {python_headers}",
        "rule compile",
        "  command = $cxx $cxx_flags $flags -MD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -pthread $in -o $out {joined('CXXFLAGS', 'LDFLAGS')}",
        "  description = link $out",
    ]
    objects = []

    def compile_source(source: Path, kind: str, flags: str) -> None:
        objects.append(f"{source.stem}.{kind}.o")
        lines.extend([f"build {objects[-1]}: compile ../../csrc/{source.name}", f"  flags = {flags}"])

    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    for source in sources:
        compile_source(source, sysconfig.get_config_var("SOABI"), "$binding_flags")
    for isa, flags in ISA_FLAGS[arch].items():
        for source in sources:
            if source.name != "module.cpp":
                compile_source(source, isa, f"-DPYPAR_ISA={isa} {flags}")
    lines.extend([f"build {output}: link {' '.join(objects)}", f"default {output}", ""])
    return "\n".join(lines)


class BuildNative(build_ext):
    """Writes build/<platform>/build.ninja, runs ninja there and copies the module to setuptools' place."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        compiler = find_compiler()
        arch = find_arch(compiler)
        folder = ROOT / "build" / f"linux-{arch}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
            copy_pybind11_headers(folder / "pybind11")
            (folder / "build.ninja").write_text(ninja_text(compiler, arch, target.name))
            sys.stdout.flush()
            result = subprocess.run([find_ninja(), "-C", str(folder)], stdin=subprocess.DEVNULL)
            if result.returncode != 0:
                raise CompileError(
                    f"the native build failed in {folder}: the compiler's message stands above"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / target.name, target)


class BuildFresh(build):
    """Empties setuptools' staging folder first: a module deleted since must not be in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":
    if sys.platform != "linux":
        raise PlatformError(f"pypar runs on Linux, this is {sys.platform}; use a Linux machine or container")
    sources = sorted(str(source.relative_to(ROOT)) for source in ROOT.glob("csrc/*.cpp"))
    setup(
        packages=[*find_packages(include=["pypar", "pypar.*"]), "pypar.kernels"],
        ext_modules=[Extension("pypar._native", sources, language="c++")],
        cmdclass={"build": BuildFresh, "build_ext": BuildNative},
    )
