"""One CUDA source, compiled for a CPU by the host runtime and by nvcc to PTX, gives the same numbers."""

import os
import shutil
import subprocess

import pytest
import torch

from tests import ROOT
from tests.harness.simt.build import KERNELS, kernel_module, why_not

PTXRUN = os.environ.get("PYPAR_PTXRUN", "")

pytestmark = [
    pytest.mark.skipif(
        not PTXRUN, reason="PYPAR_PTXRUN names no folder that holds ptxrun, which runs PTX on a CPU"
    ),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.mark.parametrize(
    ("dtype", "tag"), [(torch.bfloat16, "11BFloat16Tag"), (torch.float16, "10Float16Tag")]
)
def test_mma_ldmatrix_and_cp_async_agree_with_compiled_ptx(tmp_path, monkeypatch, dtype, tag):
    monkeypatch.syspath_prepend(PTXRUN)
    import ptxrun

    target = tmp_path / "tile_product.ptx"
    source = KERNELS / "tile_product.cu"
    command = [
        "nvcc",
        "-ptx",
        "-arch=sm_80",
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    ptx = ptxrun.Module(target.read_text())
    M, N, K = 100, 72, 88
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    ours, theirs = torch.full((2, M, N), torch.nan)
    module = kernel_module("fast")
    is_bf16 = dtype == torch.bfloat16
    module.tile_product(a.data_ptr(), b.data_ptr(), ours.data_ptr(), M, N, K, is_bf16, 0)
    (name,) = (name for name in ptx.kernels if tag in name)
    num_bytes = 2 * 2 * (64 * 40 + 32 * 72)  # as the launcher says
    ptx.launch(
        name,
        grid=(2, 2, 1),
        block=(128, 1, 1),
        args=[a, b, theirs, M, N, K],
        dynamic_smem_bytes=num_bytes,
        race="raise",
        uninit="raise",
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # both sum in fp32, in orders of their own
