"""Native attention under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

A copy of the sources is built by setup.py's own rules with the sanitizer's flags and runs workload.py. Each
sanitizer must also find a fault that is put into the copy.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pypar.ops import native
from tests import ROOT
from tests.package.test_package import load_setup

FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}
ENVIRONMENT = {
    # Python keeps memory for ever, which is no leak of ours.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {"TSAN_OPTIONS": "exitcode=77:halt_on_error=1"},
}
SUPPORTED = native.module().supported_isas()
# The lowest is the quickest to compile.
POOREST = SUPPORTED[-1]


def library_of(sanitizer):
    """The sanitizer's library, which must be loaded before Python's own."""
    (compiler, *_) = load_setup().find_compiler()
    found = subprocess.run(
        [compiler, f"-print-file-name={LIBRARY[sanitizer]}"], capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute() or not path.exists():
        pytest.skip(f"{compiler} has no {LIBRARY[sanitizer]}: install gcc's sanitizer libraries")
    return str(path.resolve())


def build(folder, sanitizer, isas, monkeypatch, fault=None):
    """The native module with attention alone, for these instruction sets. fault: (file, text, what replaces it).

    What was built in `folder` before and has not changed is not compiled again: the copied sources keep their times.
    """
    sources = folder / "csrc"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir(parents=True)
    shutil.copy2(ROOT / "csrc" / "module.cpp", sources)
    for part in ("core", "attention"):
        shutil.copytree(ROOT / "csrc" / part, sources / part)
    if fault is not None:
        name, text, replacement = fault
        before = (sources / name).read_text()
        assert before.count(text) == 1, f"{name} has changed: plant the fault elsewhere"
        (sources / name).write_text(before.replace(text, replacement))
    setup = load_setup()
    compiler = setup.find_compiler()
    arch = setup.find_arch(compiler)
    monkeypatch.setattr(setup, "ROOT", folder)
    monkeypatch.setattr(setup, "ISA_FLAGS", {arch: {isa: setup.ISA_FLAGS[arch][isa] for isa in isas}})
    monkeypatch.setenv("CXXFLAGS", f"-O1 -g1 -fno-omit-frame-pointer {FLAGS[sanitizer]}")
    monkeypatch.setenv("LDFLAGS", FLAGS[sanitizer])
    target = folder / "build" / arch
    target.mkdir(parents=True, exist_ok=True)
    setup.copy_pybind11_headers(target / "pybind11")
    text = setup.ninja_text(compiler, arch, "_native.so")
    # Of the Python side it is pybind11 that takes the time; no fault is looked for there.
    quick = "binding_flags = -O0 -fno-sanitize=all "
    (target / "build.ninja").write_text(text.replace("binding_flags = ", quick))
    result = subprocess.run([setup.find_ninja(), "-C", str(target)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    return target / "_native.so"


def run(module, sanitizer, isa, *words):
    environment = (
        os.environ | {"PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"} | ENVIRONMENT[sanitizer]
    )
    preload = ["env", f"LD_PRELOAD={library_of(sanitizer)}"]
    if sanitizer == "thread" and shutil.which("setarch"):
        preload = ["setarch", "-R", *preload]  # it knows not every place that addresses may be drawn at
    command = [
        *preload,
        sys.executable,
        str(Path(__file__).with_name("workload.py")),
        str(module),
        isa,
        *words,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def check(sanitizer, isas, monkeypatch):
    library_of(sanitizer)
    folder = ROOT / "build" / "sanitizers" / "-".join([sanitizer, *isas])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs at once
        module = build(folder, sanitizer, isas, monkeypatch)
        for isa in isas:
            result = run(module, sanitizer, isa)
            assert result.returncode == 0, f"{isa}: {result.stderr[:5000]}"
            assert "126 problems" in result.stdout


def test_addresses_and_undefined_behaviour(monkeypatch):
    check("address", [POOREST], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_every_instruction_set(sanitizer, monkeypatch):
    check(sanitizer, SUPPORTED, monkeypatch)


# A store beyond the last row of lse; threads that take the same range, since the counter is read and written apart.
FAULTS = {
    "address": ("attention/cpu/combine.h", "a.lse[index] = static_cast", "a.lse[index + 1] = static_cast"),
    "thread": (
        "core/parallel.h",
        "__atomic_fetch_add(&loop->next, loop->chunk, __ATOMIC_RELAXED)",
        "(loop->next += loop->chunk) - loop->chunk",
    ),
}
REPORTS = {"address": "heap-buffer-overflow", "thread": "data race"}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_a_planted_fault_is_found(sanitizer, tmp_path, monkeypatch):
    library_of(sanitizer)
    module = build(tmp_path, sanitizer, [POOREST], monkeypatch, FAULTS[sanitizer])
    result = run(module, sanitizer, POOREST, "forward")
    assert result.returncode != 0 and REPORTS[sanitizer] in result.stderr, result.stderr[:5000]
