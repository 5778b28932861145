"""Builds CUDA kernels for the CPU: .cu files and the host runtime of tests/harness/simt become a Python module.

Flavours: "fast" (optimised; barriers and warps are checked, memory is not), "checked" (every access of a kernel is
checked: bounds, alignment, races, shared memory never written, missing waits), "sanitized" (AddressSanitizer and
UBSan; only in a process that has `sanitizer_environment()`). Objects and modules are kept in build/simt/ under the
hash of what they were made of, for all tests and runs. Kernels ask for planted faults when they run
(csrc/core/planted.h), so that one module serves them all.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import ROOT

RUNTIME = ROOT / "tests" / "harness" / "simt"
KERNELS = RUNTIME / "kernels"
INCLUDED_FROM = (ROOT / "csrc", RUNTIME)  # beside the folder of the file that includes

_SHARED = "-std=c++17 -fPIC -fvisibility=hidden -pthread -gz"
_KERNEL = "-DPYPAR_SIMT -DPYPAR_PLANT_FAULTS -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
_FLAVOURS = {
    "fast": "-O2 -g1",
    # Inlining joins an instruction's wrapper with the kernel, so that the kernel's line is reported.
    "checked": "-O1 -g1 -finline-functions -finline-small-functions -DSIMT_CHECKED",
    "sanitized": "-O1 -g1 -DSIMT_SANITIZED",
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


def simt_module(op: str, flavour: str = "checked") -> ModuleType:
    """The module of csrc/<op>/**/*.cu: the functions of pypar._cuda, on CPU tensors."""
    sources = sorted((ROOT / "csrc" / op).rglob("*.cu"))
    if not sources:
        raise ValueError(f"csrc/{op} has no .cu file")
    return _load(_build(op, sources, flavour))


def kernel_module(flavour: str = "checked") -> ModuleType:
    """The module of all of tests/harness/simt/kernels/*.cu."""
    return _load(prepare_kernels(flavour))


def prepare_kernels(flavour: str) -> Path:
    """Builds kernel_module(flavour) and does not load it."""
    return _build("kernels", sorted(KERNELS.glob("*.cu")), flavour)


_loaded: dict[Path, ModuleType] = {}


def _load(path: Path) -> ModuleType:
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


def _read_by(sources: list[Path]) -> list[Path]:
    """The sources and every file of ours that they include, directly or not."""
    found: dict[Path, None] = {}
    left = list(sources)
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include "(.+)"', path.read_text(), re.M):
            places = [(folder / name).resolve() for folder in (path.parent, *INCLUDED_FROM)]
            left += [place for place in places if place.is_file()][:1]
    return sorted(found)


def _hash(command: str, files: list[Path]) -> str:
    digest = hashlib.sha256(command.encode())
    for path in files:
        digest.update(str(path).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    # The compiler needs no sanitizer, should this process have one.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


class _Builder:
    """Compiles into build/simt/; an object's name holds the hash of its command and of all that it includes."""

    def __init__(self, flavour: str) -> None:
        self.folder = ROOT / "build" / "simt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.flavour = flavour

    def compile(self, name: str, sources: list[Path], flags: str, first: list[Path] | None = None) -> Path:
        """The object of several sources as one, which reads shared headers once; `first` is included before them."""
        sources = [*(first or []), *sources]
        included = [word for source in sources for word in ("-include", str(source))]
        folders = [f"-I{folder}" for folder in INCLUDED_FROM]
        command = [*compiler(), *shlex.split(f"{_SHARED} {flags}"), *folders, *included]
        command += ["-x", "c++", "-c", os.devnull]
        return self._make(name, ".o", command, _read_by(sources))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process and thread at a time makes `name`; others meanwhile make other things."""
        with open(self.folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self, name: str, suffix: str, command: list[str], files: list[Path]) -> Path:
        target = self.folder / f"{name}-{_hash(shlex.join(command), files)}{suffix}"
        with self.locked(name):
            if not target.exists():
                partial = target.with_suffix(".partial")
                _run([*command, "-o", str(partial)])
                partial.rename(target)
            os.utime(target)  # last used
        return target

    def runtime(self) -> Path:
        """The machine."""
        flags = f"{_FLAVOURS[self.flavour]} -Wall -Wextra -Wno-psabi".replace("-O1", "-O2")
        names = ["devices", "fiber", "machine", "memory", "report", "shadow", "stream", "tensor_core", "warp"]
        if self.flavour == "checked":
            names.append("hooks")
        return self.compile(f"runtime-{self.flavour}", [RUNTIME / f"{name}.cpp" for name in names], flags)

    def bound(self, end: str) -> Path:
        """One of the two bounds of shared memory, which the kernels' objects go between."""
        return self.compile(
            end, [RUNTIME / "shared_bounds.cpp"], f"{_FLAVOURS['fast']} -DSIMT_BOUND=simt_shared_{end}"
        )

    def kernels(self, op: str, source: Path) -> Path:
        """The object of a .cu file's kernels and launchers."""
        flags = f"{_KERNEL} {_FLAVOURS[self.flavour]} {_KERNEL_FLAVOURS[self.flavour]}"
        return self.compile(f"{op}-{source.stem}-{self.flavour}", [source], flags, [RUNTIME / "simt.h"])

    def binding(self, op: str, sources: list[Path]) -> Path:
        """The Python side of a module, the same for every flavour."""
        flags = f"-O0 -DPYPAR_BINDING -isystem {_pybind11()} -isystem {sysconfig.get_path('include')}"
        return self.compile(f"{op}-binding", [RUNTIME / "module.cpp", *sources], flags)

    def link(self, op: str, objects: list[Path]) -> Path:
        """The module. Its folder is its own, since its file's name is the module's."""
        sanitizers = shlex.split(_SANITIZED_LINK) if self.flavour == "sanitized" else []
        command = [*compiler(), "-shared", "-pthread", "-gz", *sanitizers, *map(str, objects)]
        library = self._make(f"{op}-{self.flavour}", ".so", command, [])
        module = library.with_suffix("") / f"simt{sysconfig.get_config_var('EXT_SUFFIX')}"
        with self.locked(f"{op}-{self.flavour}"):
            module.parent.mkdir(exist_ok=True)
            if not module.exists():
                os.link(library, module)
            os.utime(module.parent)
        return module

    def prune(self, most: int = 300) -> None:
        """Removes what was not used for longest, sources having changed; a whole run uses about 60 entries."""
        with self.locked("prune"):
            entries = [path for path in self.folder.iterdir() if path.suffix in (".o", ".so", "")]
            for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[most:]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _build(op: str, sources: list[Path], flavour: str) -> Path:
    """Compiles the sources, each as kernels and together as their Python side, and links them with the runtime."""
    if flavour not in _FLAVOURS:
        raise ValueError(f"flavour is one of {', '.join(_FLAVOURS)}, not {flavour}")
    builder = _Builder(flavour)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [pool.submit(builder.kernels, op, source) for source in sources]
        parts = [pool.submit(builder.binding, op, sources), pool.submit(builder.runtime)]
        begin, end = (pool.submit(builder.bound, end) for end in ("begin", "end"))
        objects = [task.result() for task in [*parts, begin, *kernels, end]]
    path = builder.link(op, objects)
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
