"""Operators under torch.func: grad, vjp, jacrev and vmap give what plain PyTorch gives; what cannot be is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, jvp, vjp, vmap

import pypar
from pypar.ops.backend import op_modules
from pypar.ops.bucket import bucket
from pypar.ops.linear import BACKENDS, linear_input_gradient, linear_weight_gradient
from pypar.selftest import judge, rows

T, N, H = 5, 2, 4
ONEDNN = next(backend for backend in BACKENDS if backend.name == "onednn")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, MATRIX, ANGLES = numbers(H, seed=1), numbers(20, 16, seed=2), numbers(T, H // 2, seed=3)
TARGETS = torch.arange(2 * T * N).view(2, T, N) % H


def plain_attention(x, bias=None):
    q, k, v = (y.transpose(-3, -2) for y in (x, x * 0.5, x + 1))
    scores = q @ k.transpose(-2, -1) / H**0.5
    return ((scores if bias is None else scores + bias).softmax(-1) @ v).transpose(-3, -2)


def bias_of(x):
    """[2, N, T, T]"""
    return x[:, :1, :, :1].movedim(2, 1) * torch.ones(T, T)


def plain_rope(x):
    a, b = x.chunk(2, -1)
    cos, sin = ANGLES.cos()[:, None], ANGLES.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain_cross_entropy(x):
    picked = x.gather(-1, TARGETS.unsqueeze(-1)).squeeze(-1)
    return x.logsumexp(-1) - picked


def wide(x):
    return x.repeat(1, 1, 1, 4)


# x [2, T, N, H] -> a tensor: by the operator, and in plain PyTorch.
FUNCTIONS = {
    "attention": (lambda x: pypar.attention(x, x * 0.5, x + 1), plain_attention),
    "attention of the reference": (
        lambda x: pypar.attention(x, x * 0.5, x + 1, backend="reference"),
        plain_attention,
    ),
    "attention with a bias": (
        lambda x: pypar.attention(x, x * 0.5, x + 1, bias=bias_of(x)),
        lambda x: plain_attention(x, bias_of(x)),
    ),
    "scaled_dot_product_attention": (
        lambda x: pypar.scaled_dot_product_attention(x, x * 0.5, x + 1, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x * 0.5, x + 1, is_causal=True),
    ),
    "rms_norm": (lambda x: pypar.ops.rms_norm(x, WEIGHT), lambda x: F.rms_norm(x, (H,), WEIGHT, 1e-5)),
    "rms_norm's weight": (
        lambda x: pypar.ops.rms_norm(x.detach() + 1, x[0, 0, 0]),
        lambda x: F.rms_norm(x.detach() + 1, (H,), x[0, 0, 0], 1e-5),
    ),
    "rms_norm after a residual": (
        lambda x: torch.stack(pypar.rms_norm(x, WEIGHT, residual=x.sin())),
        lambda x: torch.stack((F.rms_norm(x + x.sin(), (H,), WEIGHT, 1e-5), x + x.sin())),
    ),
    "layer_norm": (
        lambda x: pypar.layer_norm(x, WEIGHT, x[0, 0, 0]),
        lambda x: F.layer_norm(x, (H,), WEIGHT, x[0, 0, 0]),
    ),
    "swiglu": (lambda x: pypar.ops.swiglu(x, x * 2), lambda x: F.silu(x) * x * 2),
    "swiglu of one tensor": (
        lambda x: pypar.swiglu(torch.cat((x, x * 2), -1)),
        lambda x: F.silu(x) * x * 2,
    ),
    "geglu": (lambda x: pypar.geglu(x, x * 2), lambda x: F.gelu(x) * x * 2),
    "clamped_swiglu": (
        lambda x: pypar.clamped_swiglu(x, x * 2),
        lambda x: x * torch.sigmoid(1.702 * x) * (x * 2 + 1),
    ),
    "rope": (lambda x: pypar.ops.rope(x, ANGLES.cos(), ANGLES.sin()), plain_rope),
    "rope of q and k": (
        lambda x: torch.cat(pypar.rope(x, ANGLES.cos(), ANGLES.sin(), x * 2), -2),
        lambda x: torch.cat((plain_rope(x), plain_rope(x * 2)), -2),
    ),
    "cross_entropy": (lambda x: pypar.ops.cross_entropy(x, TARGETS), plain_cross_entropy),
    "linear_cross_entropy": (
        lambda x: pypar.ops.linear_cross_entropy(wide(x), MATRIX, TARGETS, reduction="none"),
        lambda x: plain_cross_entropy(F.linear(wide(x), MATRIX)),
    ),
    "linear_cross_entropy's sum": (
        lambda x: pypar.ops.linear_cross_entropy(wide(x), MATRIX, TARGETS, reduction="sum")[None] * x,
        lambda x: plain_cross_entropy(F.linear(wide(x), MATRIX)).sum()[None] * x,
    ),
    "linear": (lambda x: pypar.ops.linear(wide(x), MATRIX), lambda x: F.linear(wide(x), MATRIX)),
    "linear of oneDNN": (
        lambda x: pypar.ops.linear(wide(x), MATRIX, backend="onednn"),
        lambda x: F.linear(wide(x), MATRIX),
    ),
}
LINEAR = ("linear", "linear of oneDNN")
OPERATORS = [name for name in FUNCTIONS if name not in LINEAR]


def functions(name):
    if name == "linear of oneDNN" and (reason := ONEDNN.unsupported(numbers(1, 16), 16, 20)):
        pytest.skip(reason)
    return FUNCTIONS[name]


def squares(function):
    return lambda x: function(x).square().sum()


# Of a function, what is compared.
TRANSFORMS = {
    "grad": lambda f: grad(squares(f))(numbers(2, T, N, H)),
    "vjp": lambda f: vjp(f, numbers(2, T, N, H))[1](torch.ones_like(f(numbers(2, T, N, H))))[0],
    "jacrev": lambda f: jacrev(lambda x: f(x)[0, :2, 0].square())(numbers(2, T, N, H)),
    "vmap": lambda f: vmap(f)(numbers(3, 2, T, N, H)),
    "vmap along other dimensions": lambda f: vmap(f, 1, 2)(numbers(2, 3, T, N, H)),
    "vmap of vmap": lambda f: vmap(vmap(f))(numbers(2, 2, 2, T, N, H)),
    "vmap of grad": lambda f: vmap(grad(squares(f)))(numbers(3, 2, T, N, H)),
    "grad of vmap": lambda f: grad(squares(vmap(f)))(numbers(3, 2, T, N, H)),
    "backward of vmap": lambda f: _backward(vmap(f), numbers(3, 2, T, N, H)),
}


def _backward(function, x):
    x = x.requires_grad_()
    function(x).square().sum().backward()
    return x.grad


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own attention
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_plain_pytorch(name, transform):
    ours, plain = (TRANSFORMS[transform](function) for function in functions(name))
    assert plain.abs().max() > 0
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


DIFFERENTIABLE = {
    op: [case for case in rows.cases_of(op, large=False) if case.gradients]
    for op in map(rows.op_name, op_modules())
}


@pytest.mark.parametrize("op", [op for op, cases in DIFFERENTIABLE.items() if cases])
def test_every_operator_by_its_cases(op):
    """What is not listed above is differentiated on the smallest of its own cases: as autograd does, or refused."""
    drawn = [(judge.draw_inputs(case, torch.float32), case) for case in DIFFERENTIABLE[op]]
    inputs, case = min(drawn, key=lambda pair: sum(x.numel() for x in pair[0].values()))
    name, inputs = case.gradients[0], {key: x.detach() for key, x in inputs.items()}

    def loss(x):
        out = case.ours(**inputs | {name: x}, backend=None)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    x, y = inputs[name], inputs[name].clone().requires_grad_()
    loss(y).backward()
    assert torch.equal(grad(loss)(x), y.grad)
    many = torch.stack((x, x * 0.5))
    assert torch.equal(vmap(grad(loss))(many), torch.stack([grad(loss)(one) for one in many]))
    # In silence these would be zeros.
    for derivative in (lambda: jvp(loss, (x,), (x,))[1], lambda: grad(lambda x: grad(loss)(x).sum())(x)):
        try:
            found = derivative()
        except NotImplementedError:
            continue
        assert found.abs().max() > 0


@pytest.mark.parametrize("name", ["attention", "rms_norm", "linear of oneDNN"])
def test_compiled(name):
    torch._dynamo.reset()
    ours, plain = functions(name)
    x, many = numbers(2, T, N, H), numbers(3, 2, T, N, H)
    torch.testing.assert_close(
        torch.compile(grad(squares(ours)), backend="aot_eager")(x),
        grad(squares(plain))(x),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        torch.compile(vmap(ours), backend="aot_eager")(many), vmap(plain)(many), rtol=1e-4, atol=1e-5
    )


def test_only_some_arguments_are_batched():
    q, k, bias = numbers(3, 1, T, N, H), numbers(1, 7, N, H, seed=1), numbers(1, N, T, 7, seed=2)
    out, lse = vmap(lambda q: pypar.attention(q, k, k, bias=bias, sinks=torch.zeros(N), return_lse=True))(q)
    each = [pypar.attention(one, k, k, bias=bias, sinks=torch.zeros(N), return_lse=True) for one in q]
    assert torch.equal(out, torch.stack([out for out, _ in each]))
    assert torch.equal(lse, torch.stack([lse for _, lse in each]))


def test_dropout_under_vmap_is_torchs_rule():
    x = numbers(3, 1, T, N, H)

    def dropped(x):
        return pypar.attention(x, x, x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(x)
    same = vmap(dropped, randomness="same")(x[:1].expand_as(x))
    assert torch.equal(same[0], same[1])
    different = vmap(dropped, randomness="different")(x[:1].expand_as(x))
    assert not torch.equal(different[0], different[1])


def test_a_tensor_that_is_written_must_be_batched():
    out = torch.empty(4)
    with pytest.raises(ValueError, match="writes into a tensor that is not batched"):
        vmap(lambda src: bucket(src, out=out))(numbers(3, 4))
    outs = torch.empty(3, 4)
    vmap(lambda src, out: bucket(src, 2.0, out=out))(numbers(3, 4), outs)
    assert torch.equal(outs, numbers(3, 4) * 2)
    with pytest.raises(NotImplementedError, match="bucket_forward writes into a tensor"):
        bucket(numbers(4).requires_grad_(), out=out)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    """In silence they would be zeros, or what the outermost transform can see of them."""
    first, x = grad(squares(FUNCTIONS[name][0])), numbers(2, T, N, H)
    with pytest.raises(NotImplementedError, match="differentiate once"):
        grad(lambda x: first(x).sum())(x)
    with pytest.raises(NotImplementedError, match="differentiate once"):
        _backward(lambda y: first(x * y), numbers(2, T, N, H))


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_refused(name):
    """Without a word tangents would be zeros. Where grad is inside, it must not hide them."""
    function, x = FUNCTIONS[name][0], numbers(2, T, N, H)
    for asked in (function, grad(squares(function))):
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            jvp(asked, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            function(dual)


def test_linear_is_torchs_own_in_forward_mode():
    ours, plain = functions("linear")
    x = numbers(2, T, N, H)
    torch.testing.assert_close(jvp(ours, (x,), (x,)), jvp(plain, (x,), (x,)))
    with pytest.raises(ValueError, match="has a derivative in forward mode"):
        jvp(functions("linear of oneDNN")[0], (x,), (x,))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_differentiates_twice(name):
    x = numbers(2, T, N, H)
    ours, plain = (grad(lambda x, f=f: grad(squares(f))(x).square().sum())(x) for f in functions(name))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_gradcheck_of_linears_products(backend):
    """The parts of a layer's backward are linear in both arguments; their derivatives are each other."""
    functions("linear of oneDNN" if backend == "onednn" else "linear")
    dout, x, weight = (numbers(*shape, seed=i) for i, shape in enumerate(((3, 20), (3, 16), (20, 16))))
    for function, a, b in ((linear_input_gradient, dout, weight), (linear_weight_gradient, dout, x)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = function(a, b, backend=backend)
        plain = a @ b if function is linear_input_gradient else a.t() @ b
        into = numbers(*out.shape, seed=7)
        for actual, expected in zip(
            torch.autograd.grad(out, (a, b), into), torch.autograd.grad(plain, (a, b), into), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
