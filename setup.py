"""Builds `pypar._native` and `pypar._cuda` from csrc's .cpp and .cu files with ninja: in parallel, incrementally.

Every .cpp file is compiled once per instruction set, without pybind11, with PYPAR_ISA naming the namespace of its
code, and once with PYPAR_BINDING, which holds the Python side; csrc/module.cpp is binding only. The best instruction
set is chosen at import. Every .cu file is compiled once by nvcc for all GPU architectures and once by the C++ compiler
with PYPAR_BINDING; csrc/module.cu is binding only. Objects stay in build/<platform>/, in csrc's folders, so that the
next build compiles only what changed. CXX, CPPFLAGS, CXXFLAGS and LDFLAGS are honoured; nvcc reads NVCC_PREPEND_FLAGS.
PYPAR_CUDA=0 leaves pypar._cuda out, 1 insists on it; unset, it is built where nvcc is found (PATH, CUDA_HOME).
PYPAR_CUDA_ARCHS="80 90a" builds for fewer GPUs than nvcc can.
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
# Lowest first, as the linker keeps the first of equal inline functions, and that one must run on every machine.
AMX = f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
ISA_FLAGS = {
    "x86_64": {
        "baseline": "",
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
        "amx": AMX,
        "amx_fp16": f"{AMX} -DPYPAR_FP16_TILES",
    },
    "aarch64": {"neon": ""},
}
# An instruction set that few sources use: those that contain this word. The others run with the next lower one.
ISA_WORD = {"amx": "__AMX_BF16__", "amx_fp16": "PYPAR_FP16_TILES"}
# Machine code for these, which their families share (80 runs on 86 and 89), and PTX of the first for all later ones.
CUDA_ARCHS = ("80", "90a", "100a", "120")
CUDA_MODULE = "pypar._cuda"
NVCC_FLAGS = "-std=c++17 -O3 --threads 2 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"


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


def knows_flags(compiler: list[str], flags: str) -> bool:
    """Whether `compiler` takes these flags: GCC 10 and clang 10 do not know AMX."""
    probe = [*compiler, *shlex.split(flags), "-E", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


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


def find_nvcc() -> str | None:
    """Returns nvcc's path; None where pypar._cuda is not to be built."""
    asked = os.environ.get("PYPAR_CUDA", "")
    if asked not in ("", "0", "1"):
        raise PlatformError(f"PYPAR_CUDA={asked}: 1 builds the GPU kernels, 0 leaves them out")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = None if asked == "0" else shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if asked == "1" and found is None:
        raise PlatformError(
            f"PYPAR_CUDA=1, but nvcc is neither on PATH nor in {home}/bin: install the CUDA toolkit, set CUDA_HOME,"
            " or set PYPAR_CUDA=0 to build for the CPU only"
        )
    return found


def find_cuda_archs(nvcc: str) -> list[str]:
    """Returns those of CUDA_ARCHS that nvcc knows, or of them what PYPAR_CUDA_ARCHS names."""
    result = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(
            f"`{nvcc} --list-gpu-arch` failed, CUDA >= 11.8 is needed (PYPAR_CUDA=0 builds for the CPU only):"
            f" {result.stdout}{result.stderr}"
        )
    known = [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('a')}" in result.stdout.split()]
    asked = os.environ.get("PYPAR_CUDA_ARCHS", "").split() or known
    if unknown := [arch for arch in asked if arch not in known]:
        raise PlatformError(
            f"PYPAR_CUDA_ARCHS names {', '.join(unknown)}; {nvcc} and pypar's kernels know {' '.join(known)}"
        )
    return asked


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


def environment_words(*names: str) -> str:
    """Returns the words of environment variables, quoted for ninja."""
    words = [word for name in names for word in shlex.split(os.environ.get(name, ""))]
    return shlex.join(words).replace("$", "$$")


def compile_rule(compiler: list[str]) -> list[str]:
    """Returns the rule `compile`; paths are relative to build/<platform>/."""
    cxx = shlex.join(compiler).replace("$", "$$")
    python_headers = shlex.quote(find_python_headers()).replace("$", "$$")
    return [
        f"cxx = {cxx}",
        f"cxx_flags = {CXX_FLAGS} -I../../csrc {environment_words('CPPFLAGS', 'CXXFLAGS')}",
        f"binding_flags = -DPYPAR_BINDING -isystem pybind11 -isystem {python_headers}",
        "rule compile",
        "  command = $cxx $cxx_flags $flags -MD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def ninja_text(compiler: list[str], arch: str, output: str) -> str:
    """Returns the text of build.ninja for pypar._native."""
    lines = [
        *compile_rule(compiler),
        "rule link",
        f"  command = $cxx -shared -pthread $in -o $out {environment_words('CXXFLAGS', 'LDFLAGS')}",
        "  description = link $out",
    ]
    objects = []

    def compile_source(path: Path, kind: str, flags: str) -> None:
        objects.append(f"{path.with_suffix('')}.{kind}.o")
        lines.extend([f"build {objects[-1]}: compile ../../csrc/{path}", f"  flags = {flags}"])

    texts = {path.relative_to(ROOT / "csrc"): path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")}
    for path, text in sorted(texts.items()):
        if path.name == "module.cpp" or "PYPAR_BIND(" in text:
            compile_source(path, sysconfig.get_config_var("SOABI"), "$binding_flags")
    for isa, flags in ISA_FLAGS[arch].items():
        if (word := ISA_WORD.get(isa, "")) and not knows_flags(compiler, flags):
            continue
        for path, text in sorted(texts.items()):
            if path.name != "module.cpp" and word in text:
                compile_source(path, isa, f"-DPYPAR_ISA={isa} {flags}")
    lines.extend([f"build {output}: link {' '.join(objects)}", f"default {output}", ""])
    return "\n".join(lines)


def cuda_ninja_text(compiler: list[str], nvcc: str, archs: list[str], output: str) -> str:
    """Returns the text of build.ninja for pypar._cuda. The CUDA runtime is inside, and seen by nobody else."""
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    later = f"compute_{archs[0].rstrip('a')}"
    names = shlex.quote(f'-DPYPAR_CUDA_ARCHITECTURES="{" ".join([*archs, later])}"')
    lines = [
        *compile_rule(compiler),
        f"nvcc = {shlex.quote(nvcc).replace('$', '$$')}",
        f"codes = {' '.join(codes)} -gencode arch={later},code={later}",
        f"nvcc_flags = {NVCC_FLAGS} -I../../csrc $codes",
        "rule compile_cuda",
        "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc $codes -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for path in sorted(source.relative_to(ROOT / "csrc") for source in (ROOT / "csrc").rglob("*.cu")):
        objects.append(f"{path.with_suffix('')}.{sysconfig.get_config_var('SOABI')}.o")
        lines.append(f"build {objects[-1]}: compile ../../csrc/{path}")
        lines.append(f"  flags = -x c++ $binding_flags {names}")
        if path.name != "module.cu":
            objects.append(f"{path.with_suffix('')}.cuda.o")
            lines.append(f"build {objects[-1]}: compile_cuda ../../csrc/{path}")
    lines.extend([f"build {output}: link {' '.join(objects)}", f"default {output}", ""])
    return "\n".join(lines)


class BuildNative(build_ext):
    """Writes build/<platform>/build.ninja, runs ninja there and copies the module to setuptools' place."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        compiler = find_compiler()
        arch = find_arch(compiler)
        nvcc = find_nvcc() if ext.name == CUDA_MODULE else None
        folder = ROOT / "build" / (f"linux-{arch}-cuda" if nvcc else f"linux-{arch}")
        if nvcc:
            text = cuda_ninja_text(compiler, nvcc, find_cuda_archs(nvcc), target.name)
        else:
            text = ninja_text(compiler, arch, target.name)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
            copy_pybind11_headers(folder / "pybind11")
            (folder / "build.ninja").write_text(text)
            sys.stdout.flush()
            result = subprocess.run([find_ninja(), "-C", str(folder)], stdin=subprocess.DEVNULL)
            if result.returncode != 0:
                raise CompileError(f"the native build failed in {folder}: see the compiler's message above")
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
    modules = {"pypar._native": "*.cpp"}
    if find_nvcc() and any(Path("csrc").rglob("*.cu")):
        modules[CUDA_MODULE] = "*.cu"
    setup(
        packages=[*find_packages(include=["pypar", "pypar.*"]), "pypar.kernels"],
        ext_modules=[
            Extension(name, sorted(map(str, Path("csrc").rglob(sources))), language="c++")
            for name, sources in modules.items()
        ],
        cmdclass={"build": BuildFresh, "build_ext": BuildNative},
    )
