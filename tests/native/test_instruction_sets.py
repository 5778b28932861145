"""The native module: instruction sets, threads, and that no instruction set's code reaches another's callers."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from pypar.ops import native
from pypar.ops.attention import attention
from tests import ROOT

SUPPORTED = native.module().supported_isas()
SHOW = "from pypar.ops import native; print(native.module().selected_isa())"


def run_with_isa(isa):
    environment = {**os.environ, "PYPAR_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_the_best_instruction_set_is_chosen():
    if "PYPAR_ISA" not in os.environ:
        assert native.module().selected_isa() == SUPPORTED[0]
    assert SUPPORTED[-1] in ("baseline", "neon")


def test_environment_names_the_instruction_set():
    assert run_with_isa(SUPPORTED[-1]).stdout.strip() == SUPPORTED[-1]


def test_an_instruction_set_that_the_cpu_lacks_is_an_error():
    result = run_with_isa("neon" if "neon" not in SUPPORTED else "avx2")
    assert result.returncode != 0
    assert "PYPAR_ISA: instruction set" in result.stderr and SUPPORTED[-1] in result.stderr
    with pytest.raises(ValueError, match="instruction set 'mmx' is not one that this CPU has: choose from"):
        native.module().select_isa("mmx")


def test_threads_are_those_of_torch():
    """Kernels start no threads beside torch's OpenMP pool, which exists once torch itself has run in parallel."""
    if native._torch_parallel_entry() == 0:
        pytest.skip("this torch has no libgomp")
    q = torch.randn(1, 300, 4, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(1 << 22).exp()
        num_threads = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            attention(q, q, q)
        assert len(os.listdir("/proc/self/task")) == num_threads
    finally:
        torch.set_num_threads(before)


def test_threads_of_our_own():
    """What runs where torch has no libgomp; in a process of its own, since the choice is the process's."""
    program = (
        "import torch; from pypar.ops import native; from pypar.ops.attention import attention\n"
        "q = torch.randn(2, 300, 4, 16); expected = attention(q, q, q)\n"
        "native.module().set_parallel_entry(0)\n"
        "for count in (2, 3, 1, 4):\n"
        "    torch.set_num_threads(count)\n"
        "    assert all(torch.equal(attention(q, q, q), expected) for _ in range(20))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "source",
    sorted((ROOT / "csrc").rglob("*.cpp")),
    ids=lambda path: str(path.relative_to(ROOT / "csrc").with_suffix("")),
)
def test_no_code_leaks_from_an_instruction_set(source, tmp_path):
    """An inline function or template outside namespace pypar::<isa> is merged by the linker with that of other
    objects, and the CPU may lack the instructions of the one that is kept. Without optimisation all are visible."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if source.stem == "module" or compiler is None or shutil.which("nm") is None:
        pytest.skip("compiled once" if source.stem == "module" else "needs a C++ compiler and nm")
    isa, flags = (
        ("neon", []) if platform.machine() == "aarch64" else ("avx2", ["-mavx2", "-mfma", "-mf16c", "-mbmi2"])
    )
    target = tmp_path / "unit.o"
    flags = ["-std=c++17", "-O0", "-fPIC", *flags, f"-DPYPAR_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
    allowed = (f"pypar::{isa}::", "DW.ref.__gxx_personality")  # the second is data
    shared = [
        line for line in symbols.splitlines() if line[17:18] in "WVu" and not any(x in line for x in allowed)
    ]
    assert not shared, shared
    initialisers = [line for line in symbols.splitlines() if "_GLOBAL__sub_I" in line]
    assert not initialisers, f"runs when the module is loaded, on any CPU: {initialisers}"
