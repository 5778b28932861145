"""How setup.py builds the GPU kernels, and what the built module promises without a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pypar.bench.gpu.flow import Flow
from pypar.bench.gpu.machine_code import (
    LIMITS,
    find_tool,
    is_tensor,
    num_spills,
    read_kernels,
    resident_blocks,
)
from tests import ROOT
from tests.package.test_package import load_setup


def fake_nvcc(folder: Path, archs: str) -> str:
    """A program that lists these architectures, as nvcc does."""
    program = folder / "nvcc"
    program.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in archs.split()))
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def setup(monkeypatch):
    for name in ("PYPAR_CUDA", "PYPAR_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


def test_nvcc_is_looked_for_on_path_and_in_cuda_home(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup.find_nvcc() is None
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    inside = fake_nvcc(tmp_path / "cuda" / "bin", "80")
    assert setup.find_nvcc() == inside
    assert setup.find_nvcc() == inside
    on_path = fake_nvcc(tmp_path, "80")
    assert setup.find_nvcc() == on_path


def test_pypar_cuda_decides(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PYPAR_CUDA", "1")
    with pytest.raises(
        Exception, match="PYPAR_CUDA=1, but nvcc is neither on PATH nor in .*/none/bin: install"
    ):
        setup.find_nvcc()
    found = fake_nvcc(tmp_path, "80")
    assert setup.find_nvcc() == found
    monkeypatch.setenv("PYPAR_CUDA", "0")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("PYPAR_CUDA", "yes")
    with pytest.raises(Exception, match="PYPAR_CUDA=yes: 1 builds the GPU kernels, 0 leaves them out"):
        setup.find_nvcc()


def test_archs_are_those_that_nvcc_knows(setup, monkeypatch, tmp_path):
    assert setup.find_cuda_archs(fake_nvcc(tmp_path, "75 80 86 90 100 120")) == ["80", "90a", "100a", "120"]
    older = fake_nvcc(tmp_path, "75 80 86 90")
    assert setup.find_cuda_archs(older) == ["80", "90a"]
    monkeypatch.setenv("PYPAR_CUDA_ARCHS", "90a")
    assert setup.find_cuda_archs(older) == ["90a"]
    monkeypatch.setenv("PYPAR_CUDA_ARCHS", "80 120")
    with pytest.raises(Exception, match="PYPAR_CUDA_ARCHS names 120; .*nvcc and pypar's kernels know 80 90a"):
        setup.find_cuda_archs(older)


def test_nvcc_that_fails_is_a_sentence(setup, tmp_path):
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\necho no such option\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(Exception, match="--list-gpu-arch` failed, CUDA >= 11.8 is needed .*no such option"):
        setup.find_cuda_archs(str(program))


def test_every_source_is_compiled_for_gpu_and_for_python(setup):
    text = setup.cuda_ninja_text(["g++"], "nvcc", ["80", "90a"], "_cuda.so")
    assert "arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a" in text
    assert "-gencode arch=compute_80,code=compute_80" in text  # for later GPUs
    linked = next(line for line in text.splitlines() if line.startswith("build _cuda.so: link")).split()[3:]
    paths = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cu")]
    sources = sorted(str(path.with_suffix("")) for path in paths)
    assert [name.split(".")[0] for name in linked if not name.endswith("cuda.o")] == sources
    assert [name for name in linked if name.endswith("cuda.o")] == [
        f"{s}.cuda.o" for s in sources if s != "module"
    ]


SMALL_KERNEL = """
#ifndef PYPAR_BINDING
namespace pypar::cuda {
__global__ void one_kernel(int* x) { *x = 1; }
int one() {
  one_kernel<<<1, 1>>>(nullptr);
  return static_cast<int>(cudaGetLastError());
}
}
#else
#include "core/registry.h"
namespace pypar::cuda {
int one();
}
PYPAR_BIND(one) { module.def("one", &pypar::cuda::one); }
#endif
"""


@pytest.mark.slow  # make test stands on a build already
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_built_module_loads_without_a_driver_and_is_not_built_twice(setup, monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    for folder in ("pypar", "kernels", "csrc/core"):
        (tree / folder).mkdir(parents=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "pypar/__init__.py",
        "kernels/__init__.py",
        "csrc/module.cu",
        "csrc/module.cpp",
        "csrc/core/registry.h",
    ):
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc" / "one.cu").write_text(SMALL_KERNEL)
    monkeypatch.setenv("PYPAR_CUDA_ARCHS", "80")
    monkeypatch.setenv("CXXFLAGS", "-O0")  # of pybind11's headers, which take the time
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    first, second = (
        subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert "one.cuda.o" in first.stdout
    assert second.stdout.count("no work to do") == 2
    shutil.copy(tree / "pypar" / "__init__.py", tree / "out" / "pypar")
    code = "from pypar import _cuda; print(_cuda.architectures, '/', _cuda.one())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree / "out", capture_output=True, text=True, env={"PATH": ""}
    )
    architectures, error = result.stdout.split("/")
    assert architectures.strip() == "80 compute_80", result.stderr
    assert torch.cuda.is_available() or int(error) != 0


# ---- the module that is installed


@pytest.fixture(scope="module")
def cuda():
    return pytest.importorskip(
        "pypar._cuda", reason="pypar._cuda is not built: nvcc was not found, or PYPAR_CUDA=0"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_call_without_a_gpu_says_so(cuda):
    from pypar.ops.attention import native as attention_native
    from pypar.ops.attention.arguments import attention_problem

    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no CUDA device can be used"):
        attention_native.forward(cuda, attention_problem(q, q, q), None)


def test_it_is_not_loaded_for_the_cpu(cuda):
    code = (
        "import sys, torch, pypar; x = torch.zeros(1, 4, 1, 8); pypar.attention(x, x, x)\n"
        "assert 'pypar._native' in sys.modules and 'pypar._cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cuda_runtime_stays_inside(cuda):
    """torch brings a CUDA runtime of its own, maybe another version: neither must see the other's functions."""
    names = subprocess.run(
        ["nm", "-D", "--defined-only", cuda.__file__], capture_output=True, text=True, check=True
    )
    assert not re.search(r" cuda\w+$", names.stdout, re.MULTILINE)
    needed = subprocess.run(["ldd", cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libtorch" not in needed and "libcuda.so" not in needed


def test_no_kernel_has_a_stack(cuda):
    tool = find_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump not found: it comes with Triton or the CUDA toolkit")
    usage = subprocess.run(
        [tool, "-res-usage", cuda.__file__], capture_output=True, text=True, check=True
    ).stdout
    stacks = re.findall(r"Function (\S+):\s*\n.*?STACK:(\d+)", usage)
    assert len(stacks) >= len(cuda.attention_forward_kernels())
    assert [name for name, stack in stacks if stack != "0"] == []


@pytest.mark.slow
def test_no_kernel_spills_and_the_main_loops_are_found(cuda):
    if find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump not found: it comes with Triton or the CUDA toolkit")
    kernels = list(read_kernels(Path(cuda.__file__), list(LIMITS)))
    for kernel in kernels:
        assert num_spills(kernel) == 0 and kernel.stack == 0, (kernel.arch, kernel.symbol)
        if "ForwardShape" in kernel.symbol:
            path = Flow(kernel.code).hot_path()
            tensor = sum(map(is_tensor, path))
            assert tensor >= 16 and len(path) < 12 * tensor, (kernel.arch, kernel.symbol)
    for part, *_ in [*cuda.attention_forward_kernels(), *cuda.allreduce_kernels()]:
        assert any(part in kernel.symbol for kernel in kernels), part


def test_blocks_of_a_multiprocessor():
    """Against NVIDIA's occupancy tables."""
    assert resident_blocks("sm_80", 254, 128, 82496) == 2  # registers, and shared memory
    assert resident_blocks("sm_90a", 168, 128, 1024) == 3  # registers
    assert resident_blocks("sm_80", 32, 1024, 0) == 2  # warps
    assert resident_blocks("sm_120", 16, 32, 0) == 24  # slots
    assert resident_blocks("sm_120", 32, 128, 99 * 1024) == 1
