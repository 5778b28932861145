"""Builds CUDA kernels for the CPU: a .cu file and the host runtime of tests/harness/simt become a Python module.

Flavours: "fast" (optimised; barriers and warps are checked, memory is not), "checked" (every access of a kernel is
checked: bounds, alignment, races, shared memory never written, missing waits), "sanitized" (AddressSanitizer and
UBSan; only in a process that has `sanitizer_environment()`). A module is kept in build/simt/ under the hash of what
it was made of.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import ROOT

RUNTIME = ROOT / "tests" / "harness" / "simt"
KERNELS = RUNTIME / "kernels"

_SHARED = "-std=c++17 -fPIC -fvisibility=hidden -pthread -gz"
_KERNEL = "-x c++ -DPYPAR_SIMT -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
_FLAVOURS = {
    "fast": "-O2 -g1",
    # Inlining joins an instruction's wrapper with the kernel, so that the kernel's line is reported.
    "checked": "-O1 -g -finline-functions -finline-small-functions -DSIMT_CHECKED",
    "sanitized": "-O1 -g -DSIMT_SANITIZED",
}
_KERNEL_FLAVOURS = {
    "fast": "",
    "checked": "-fsanitize=thread,alignment,bounds --param tsan-instrument-func-entry-exit=0",
    "sanitized": "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all",
}
_SANITIZED_LINK = "-fsanitize=address,undefined"


def compiler() -> list[str]:
    """The C++ compiler's command; the checked flavour needs g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which(compiler()[0]) is None:
        return f"needs {compiler()[0]}"
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return "the host runtime is built with g++"
    return None if _pybind11() is not None else "needs pybind11's headers: build pypar once"


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that loads a sanitized module: the sanitizer must be there before all others."""
    libraries = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # The interpreter frees nothing at its end; torch's libraries hold the same symbols several times.
    options = "detect_leaks=0:detect_odr_violation=0"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def simt_module(op: str, flavour: str = "checked", defines: Iterable[str] = ()) -> ModuleType:
    """The module of csrc/<op>/**/*.cu: the functions of pypar._cuda, on CPU tensors."""
    sources = sorted((ROOT / "csrc" / op).rglob("*.cu"))
    if not sources:
        raise ValueError(f"csrc/{op} has no .cu file")
    return build(sources, flavour, defines)


def kernel_module(name: str, flavour: str = "checked", defines: Iterable[str] = ()) -> ModuleType:
    """The module of tests/harness/simt/kernels/<name>.cu."""
    return build([KERNELS / f"{name}.cu"], flavour, defines)


def prepare_kernel(name: str, flavour: str, defines: Iterable[str] = ()) -> None:
    """Builds kernel_module(...) and does not load it."""
    _build_library([KERNELS / f"{name}.cu"], flavour, defines)


_loaded: dict[Path, ModuleType] = {}


def build(sources: list[Path], flavour: str, defines: Iterable[str] = ()) -> ModuleType:
    """Compiles the sources, each as kernels and as their Python side, links them with the runtime and imports it."""
    path = _build_library(sources, flavour, defines)
    if path not in _loaded:
        # pybind11 keeps one module per full name; the last part names the entry.
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}.simt", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _loaded[path] = module
    return _loaded[path]


def _pybind11() -> str | None:
    """The folder of pybind11's headers: the one that setup.py copied, else the package's."""
    copied = ROOT / "build" / f"linux-{platform.machine()}" / "pybind11"
    if (copied / "pybind11" / "pybind11.h").is_file():
        return str(copied)
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return pybind11.get_include()


def _headers() -> list[Path]:
    return sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *RUNTIME.glob("*.h")])


def _hash(command: str, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(command.encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    # The compiler needs no sanitizer, should this process have one.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


class _Builder:
    """Compiles into build/simt/; an object's name holds the hash of its command and of all that it includes."""

    def __init__(self, flavour: str, defines: list[str]) -> None:
        self.folder = ROOT / "build" / "simt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.flavour, self.defines = flavour, defines
        self.headers = _headers()
        python = sysconfig.get_path("include")
        self.python_side = f"-O0 -DPYPAR_BINDING -isystem {_pybind11()} -isystem {python}"

    def compile(self, source: Path, flags: str, name: str | None = None) -> Path:
        """The object of one source."""
        command = [*compiler(), *shlex.split(f"{_SHARED} {flags}"), f"-I{ROOT / 'csrc'}", "-c", str(source)]
        key = _hash(shlex.join(command), [source, *self.headers])
        return self._make(f"{name or source.stem}-{key}.o", command)

    def _make(self, name: str, command: list[str]) -> Path:
        target = self.folder / name
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run([*command, "-o", str(partial)])
            partial.rename(target)
        os.utime(target)  # last used
        return target

    def runtime(self) -> list[Path]:
        """The machine's objects, and the bounds of shared memory, which the kernels' objects go between."""
        flags = f"{_FLAVOURS[self.flavour]} -Wall -Wextra -Wno-psabi".replace("-O1", "-O2")
        names = ["devices", "fiber", "machine", "memory", "report", "shadow", "stream", "tensor_core", "warp"]
        if self.flavour == "checked":
            names.append("hooks")
        objects = [self.compile(RUNTIME / f"{name}.cpp", flags) for name in names]
        objects.append(self.compile(RUNTIME / "module.cpp", self.python_side))
        bounds = RUNTIME / "shared_bounds.cpp"
        return objects + [
            self.compile(bounds, f"{flags} -DSIMT_BOUND=simt_shared_{end}", end) for end in ("begin", "end")
        ]

    def kernels(self, source: Path) -> Path:
        """The object of a .cu file's kernels and launchers."""
        flags = f"{_KERNEL} {_FLAVOURS[self.flavour]} {_KERNEL_FLAVOURS[self.flavour]} -include {RUNTIME / 'simt.h'}"
        return self.compile(source, f"{flags} {shlex.join(self.defines)}")

    def binding(self, source: Path) -> Path:
        """The object of a .cu file's Python side."""
        return self.compile(source, f"-x c++ {self.python_side}", f"{source.stem}-binding")

    def link(self, objects: list[Path]) -> Path:
        """The module. Its folder is its own, since its file's name is the module's."""
        sanitizers = shlex.split(_SANITIZED_LINK) if self.flavour == "sanitized" else []
        command = [*compiler(), "-shared", "-pthread", "-gz", *sanitizers, *map(str, objects)]
        folder = self.folder / f"module-{_hash(shlex.join(command), [])}"
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        return self._make(f"{folder.name}/simt{sysconfig.get_config_var('EXT_SUFFIX')}", command)

    def prune(self, most: int = 300) -> None:
        """Removes what was not used for longest, sources having changed."""
        entries = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[most:]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _build_library(sources: list[Path], flavour: str, defines: Iterable[str]) -> Path:
    if flavour not in _FLAVOURS:
        raise ValueError(f"flavour is one of {', '.join(_FLAVOURS)}, not {flavour}")
    builder = _Builder(flavour, [f"-D{name}" for name in defines])
    with open(builder.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        *runtime, begin, end = builder.runtime()
        bindings = [builder.binding(source) for source in sources]
        kernels = [builder.kernels(source) for source in sources]
        path = builder.link([*runtime, *bindings, begin, *kernels, end])
        builder.prune()
    return path


class _Register(TorchDispatchMode):
    """Registers the memory of every tensor that an operator makes, unless it is one of the inputs'."""

    def __init__(self, module: ModuleType, inputs: set[int]) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.nbytes() > 0 and storage.data_ptr() not in self.inputs:
                    self.module.register_buffer(storage.data_ptr(), storage.nbytes(), leaf.element_size())
        return result


def register(module: ModuleType, tensor: torch.Tensor, *, writable: bool = True, name: str = "") -> None:
    """Lets kernels touch a CPU tensor: what lies between its first and its last element."""
    if tensor.numel() > 0:
        spans = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        num_bytes = (1 + sum(spans)) * tensor.element_size()
        module.register_buffer(tensor.data_ptr(), num_bytes, tensor.element_size(), writable, name)


@contextmanager
def buffers(module: ModuleType, /, **inputs: torch.Tensor | None) -> Iterator[None]:
    """Within, kernels may read the inputs, and read and write tensors that are made meanwhile; nothing else."""
    module.clear_buffers()
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    for name, tensor in present.items():
        register(module, tensor, writable=False, name=name)
    try:
        with _Register(module, {tensor.untyped_storage().data_ptr() for tensor in present.values()}):
            yield
    finally:
        module.clear_buffers()
