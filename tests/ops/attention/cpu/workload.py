"""A native module's attention with every option, without torch: what a sanitizer watches.

    python tests/ops/attention/cpu/workload.py MODULE ISA [forward]

Arrays have exactly the sizes that they must have, so that a step beyond one is seen. One thread and two must agree.
"""

import ctypes
import importlib.machinery
import importlib.util
import math
import sys
import weakref

import numpy as np

LIBC = ctypes.CDLL(None)
N, G = 4, 2
# (B, T, S, H, Hv, sequences): odd sizes, several blocks, decoding, nothing at all.
SHAPES = [
    (2, 37, 53, 20, 12, None),
    (1, 130, 201, 64, 64, None),
    (1, 1, 700, 32, 40, None),
    (1, 3, 530, 33, 8, None),
    (1, 70, 0, 16, 16, None),
    (3, 140, 190, 32, 32, ((0, 70, 70, 140), (0, 63, 100, 190))),
    (2, 5, 4, 24, 8, ((0, 5, 5), (0, 0, 4))),
]
NOTHING = {"softcap": 0.0, "left": -1, "right": -1, "dropout_p": 0.0}
OPTIONS = [
    {},
    {"right": 0},
    {"left": 9, "right": 4, "softcap": 3.0, "bias": True, "sinks": True},
    {"right": 0, "slopes": True, "dropout_p": 0.3, "carry": True},
    {"left": 20, "right": 0, "softcap": 20.0, "sinks": True, "slopes": True, "dropout_p": 0.3, "bias": True},
    {"positions": (11, 3, 2), "right": 5, "bias": True, "dropout_p": 0.1},
]


class Run:
    """One problem and its arrays, which live as long as it does."""

    def __init__(self, shape, options, dtype, num_threads):
        self.random = np.random.default_rng(1)
        self.dtype, self.options, self.kept = dtype, options, []
        self.B, self.T, self.S, self.H, self.Hv, self.ends = shape
        lead = () if self.ends else (self.B,)
        self.q_shape, self.k_shape = (*lead, self.T, N, self.H), (*lead, self.S, G, self.H)
        self.v_shape, self.out_shape = (*lead, self.S, G, self.Hv), (*lead, self.T, N, self.Hv)
        self.lse_shape = (*lead, N, self.T)
        self.problem = self._problem(num_threads)

    def array(self, shape, dtype=0, fill=None):
        x = (
            self.random.standard_normal(shape).astype(np.float32)
            if fill is None
            else np.full(shape, fill, np.float32)
        )
        if dtype == 1:
            x = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
        elif dtype == 2:
            x = x.astype(np.float16)
        self.kept.append(x)
        return x

    def tensor(self, x, dtype):
        steps = [step // x.itemsize for step in x.strides]
        return x.ctypes.data, tuple(steps if x.ndim == 4 else [0, *steps]), dtype

    def address(self, x):
        self.kept.append(x)
        return x.ctypes.data

    def _problem(self, num_threads):
        of = NOTHING | self.options
        q_start, k_start, step = of.get("positions", (0, 0, 1))
        ends = [0, 0] if not self.ends else [self.address(np.array(x, np.int32)) for x in self.ends]
        bias = None
        if of.get("bias") and not self.ends:
            bias = self.tensor(self.array((self.B, N, self.T, self.S), self.dtype), self.dtype)
        shapes = {"q": self.q_shape, "k": self.k_shape, "v": self.v_shape}
        sizes = {"B": self.B, "T": self.T, "S": self.S, "N": N, "G": G, "H": self.H, "Hv": self.Hv}
        return {
            **sizes,
            **{name: self.tensor(self.array(x, self.dtype), self.dtype) for name, x in shapes.items()},
            "cu_seqlens_q": ends[0],
            "cu_seqlens_k": ends[1],
            "scale": 0.2,
            **{name: of[name] for name in NOTHING},
            "bottom_right": "positions" not in of,
            "q_start": q_start,
            "k_start": k_start,
            "step": step,
            "batch_start": 0,
            "head_start": 0,
            "bias": bias,
            "sinks": self.array((N,)).ctypes.data if of.get("sinks") else 0,
            "alibi_slopes": np.abs(self.array((self.B, N)), out=self.kept[-1]).ctypes.data
            if of.get("slopes")
            else 0,
            "alibi_batch_stride": N if of.get("slopes") else 0,
            "dropout_threshold": math.floor(of["dropout_p"] * 2**32),
            "seed": self.address(np.array([77], np.int64)) if of["dropout_p"] else 0,
            "num_threads": num_threads,
            "stream": 0,
        }

    def memory(self, count):
        """As torch's memory: at a multiple of 64 bytes."""
        if not count:
            return 0
        address = ctypes.c_void_p()
        assert LIBC.posix_memalign(ctypes.byref(address), 64, ctypes.c_size_t(count)) == 0
        weakref.finalize(self, LIBC.free, address)
        return address.value

    def forward(self, module):
        carry = self.options.get("carry", False)
        out_dtype = 0 if carry else self.dtype
        out, lse = self.array(self.out_shape, out_dtype), self.array(self.lse_shape)
        rest = self.array(self.lse_shape)
        memory = self.memory(module.attention_forward_memory(self.problem))
        addresses = lse.ctypes.data, rest.ctypes.data
        module.attention_forward(self.problem, self.tensor(out, out_dtype), *addresses, carry, memory)
        return out, lse, rest

    def backward(self, module, lse, rest):
        accumulate = self.options.get("carry", False)
        dtype = 0 if accumulate else self.dtype
        dout, out = (self.tensor(self.array(self.out_shape, self.dtype), self.dtype) for _ in range(2))
        gradients = [self.array(x, dtype) for x in (self.q_shape, self.k_shape, self.v_shape)]
        dbias = None if self.problem["bias"] is None else self.array((self.B, N, self.T, self.S), fill=0.0)
        memory = self.memory(module.attention_backward_memory(self.problem))
        dlse = self.array(self.lse_shape).ctypes.data
        module.attention_backward(
            self.problem,
            dout,
            out,
            lse.ctypes.data,
            rest.ctypes.data,
            dlse,
            *(self.tensor(x, dtype) for x in gradients),
            accumulate,
            0 if dbias is None else dbias.ctypes.data,
            memory,
        )
        return gradients if dbias is None else [*gradients, dbias]


def run_all(module, only_forward):
    """How many problems were run."""
    count = 0
    for shape in SHAPES:
        for options in OPTIONS:
            for dtype in (0, 1, 2):
                results = []
                for num_threads in (1, 2):
                    run = Run(shape, options, dtype, num_threads)
                    out, lse, rest = run.forward(module)
                    results.append([out, lse, *([] if only_forward else run.backward(module, lse, rest))])
                for one, two in zip(*results, strict=True):
                    assert one.tobytes() == two.tobytes(), (shape, options, dtype)
                count += 1
    return count


def main(path, isa, *words):
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
    loader.exec_module(module)
    module.set_parallel_entry(0)  # threads of the module's own: a sanitizer knows nothing of libgomp's
    module.select_isa(isa)
    print(run_all(module, "forward" in words), "problems")


if __name__ == "__main__":
    main(*sys.argv[1:])
