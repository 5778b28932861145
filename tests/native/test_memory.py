"""What reaches native code is memory: tensors that only stand for some are refused, and it stays until it was read."""

import ctypes
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pypar
from pypar.ops import native
from pypar.ops.attention import attention_forward
from pypar.ops.attention.arguments import attention_problem


def only_traced():
    """Tensors without memory of their own, by what makes them."""
    x = torch.randn(3, 4)
    yield "FakeTensorMode", FakeTensorMode().from_tensor(x)
    yield "functionalization", torch._to_functional_tensor(x)
    yield "the meta device", x.to("meta")
    yield "sparse", x.to_sparse()
    seen = []
    torch.vmap(lambda y: (seen.append(y), y)[1])(x)
    torch.func.grad(lambda y: (seen.append(y), y.sum())[1])(x)
    yield from zip(("vmap", "grad"), seen, strict=True)
    yield "a lazy negation", torch.randn(3, dtype=torch.complex64).conj().imag


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_do_not_reach_native_code():
    called = []
    for what, x in only_traced():
        sentence = (
            "negated or conjugated"
            if what == "a lazy negation"
            else f"a {type(x).__name__} of shape .* has no memory"
        )
        for arguments in ((x,), ({"q": (x, (4, 1), 0)},)):
            with pytest.raises(ValueError, match=sentence):
                native.run(called.append, *arguments)
    assert not called
    x = torch.randn(2)
    native.run(called.append, {"x": (x, 1.5), "none": None, "empty": torch.empty(0)})
    assert called == [{"x": (x.data_ptr(), 1.5), "none": None, "empty": 0}]


def test_fake_tensors_get_no_kernel():
    with FakeTensorMode() as mode:
        q = mode.from_tensor(torch.randn(1, 4, 1, 8))
        assert pypar.attention(q, q, q).shape == q.shape  # the operator knows shapes without values
        with pytest.raises(ValueError, match="a FakeTensor of shape .* has no memory"):
            attention_forward(attention_problem(q, q, q))


def test_memory_outlives_a_graphs_intermediates():
    """A graph that was asked for addresses would free what they point to before they are read."""

    def first(address):
        return ctypes.c_float.from_address(address).value

    def run(x):
        return native.run(first, x * 3) + native.run(first, x.sin() + 1)

    torch._dynamo.reset()
    x = torch.randn(1 << 20)
    for function in (run, torch.compile(run, backend="eager")):
        assert function(x) == pytest.approx(3 * x[0].item() + x[0].sin().item() + 1, rel=1e-5)


def test_who_compiles_nothing_does_not_import_the_compiler():
    code = (
        "import sys, torch, pypar, pypar.comm, pypar.data_parallel, pypar.tensor_parallel\n"
        "q = torch.randn(1, 4, 1, 8, requires_grad=True)\n"
        "pypar.attention(q, q, q).sum().backward()\n"
        "pypar.context_parallel.shard(q, 1, pypar.Mesh().cp, 'zigzag')\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
