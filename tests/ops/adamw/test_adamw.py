"""adamw: accuracy, and the same bits on every backend, instruction set, cut and number of threads."""

import itertools
from dataclasses import replace

import pytest
import torch

from pypar.ops import native
from pypar.ops.adamw import Blocks, Place, Update, adamw, zero_blocks
from pypar.selftest.cases import adamw as cases
from pypar.selftest.judge import check_case
from tests.harness.native_kernels import instruction_set

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = native.module().supported_isas()
COUNTS = [1, 63, 1023]


def tensors(state):
    """All of a state, by name."""
    found = {}
    for name, column in state.items():
        for i, x in enumerate(column):
            found |= {f"{name}{i}.{j}": y for j, y in enumerate(x if isinstance(x, tuple) else (x,))}
    return found


def same(first, second):
    """Bit by bit, a missing number like another."""
    for name, x in tensors(first).items():
        y = tensors(second)[name]
        assert torch.equal(x.isnan(), y.isnan()), name
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


def updates(state, backend, steps=2, seed=None, **options):
    for step in range(1, steps + 1):
        update = replace(cases.UPDATE, step=step, seed=seed)
        adamw(**state, update=update, backend=backend, **options)
    return state


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [cases.PLAIN, cases.MASTER, cases.SAME], ids=lambda form: form.name)
def test_accuracy(name, dtype, form):
    for count in COUNTS:
        check_case(cases.case(count, form), dtype, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", cases.FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_has_the_bits_of_the_definition(isa, form, dtype):
    for count in COUNTS:
        expected = updates(cases.state(count, form, dtype), "reference", seed=form.seed, scale=0.7)
        with instruction_set(isa):
            found = updates(cases.state(count, form, dtype), "native", seed=form.seed, scale=0.7)
        same(found, expected)


@pytest.mark.parametrize(("gradient", "param"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("moments", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 3])
def test_every_pair_of_dtypes_has_the_bits_of_the_definition(gradient, param, moments, seed):
    for master in (False, True):
        found, expected = (
            updates(_mixed(gradient, param, cases.Form("", master, moments)), name, seed=seed)
            for name in ("native", "reference")
        )
        same(found, expected)


def _mixed(gradient, param, form):
    state = cases.state(111, form, param)
    return {**state, "gradients": [state["gradients"][0].to(gradient)]}


@pytest.mark.parametrize("form", cases.FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cut_and_the_number_of_threads_change_no_bit(form, dtype):
    count, before = 70_000, torch.get_num_threads()
    whole = updates(cases.state(count, form, dtype), "native", seed=form.seed)
    edges = (
        [0, 256, 33_024, 50_000 // 256 * 256, count]
        if form is cases.EIGHT_BITS
        else [0, 1, 33_000, 50_001, count]
    )
    state = cases.state(count, form, dtype)
    parts = {
        name: [_part(x, begin, end) for x in column for begin, end in itertools.pairwise(edges)]
        for name, column in state.items()
    }
    torch.set_num_threads(3)
    try:
        updates(parts, "native", seed=form.seed)
    finally:
        torch.set_num_threads(before)
    same(state, whole)


def _part(x, begin, end):
    if isinstance(x, Blocks):
        return Blocks(x.codes[begin:end], x.absmax[begin // 256 : -(-end // 256)])
    return x[begin:end]


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_matrix_cut_by_columns_is_rounded_as_the_whole(name):
    rows, columns, cut, first = (
        37,
        53,
        20,
        (1 << 32) - 700,
    )  # the upper half of the numbers changes on the way
    whole = cases.state(rows * columns, cases.STOCHASTIC, torch.bfloat16)
    parts = {
        key: [
            y.contiguous()
            for x in column
            for y in x.clone().view(rows, columns).split([cut, columns - cut], 1)
        ]
        for key, column in whole.items()
    }
    updates(whole, "native", seed=9, places=[Place(first, rows * columns, 0)])
    places = [Place(first, cut, columns), Place(first + cut, columns - cut, columns)]
    updates(parts, name, seed=9, places=places)
    for key, column in whole.items():
        for x in column:
            assert torch.equal(torch.cat(parts[key], 1).flatten(), x), key


@pytest.mark.parametrize("name", ["native", "reference"])
def test_scale_maximize_and_found_inf(name):
    state = cases.state(300, cases.MASTER, torch.bfloat16)
    expected = updates({**_copy(state), "gradients": [-0.25 * state["gradients"][0]]}, name)
    for scale in (0.25, torch.tensor([0.25])):
        found = _copy(state)
        for step in (1, 2):
            adamw(**found, update=replace(cases.UPDATE, step=step, maximize=True), scale=scale, backend=name)
        same({**found, "gradients": []}, {**expected, "gradients": []})
    kept = _copy(state)
    updates(kept, name, found_inf=torch.tensor([1.0]))
    same(kept, state)
    updates(kept, name, found_inf=torch.tensor([0.0]))
    assert not torch.equal(kept["params"][0], state["params"][0])


def _copy(state):
    return {
        name: [Blocks(*map(torch.clone, x)) if isinstance(x, Blocks) else x.clone() for x in column]
        for name, column in state.items()
    }


@pytest.mark.parametrize("form", cases.FORMS, ids=lambda form: form.name)
def test_missing_and_infinite_gradients_are_seen(form):
    for wrong in (torch.inf, torch.nan):
        found, expected = (cases.state(600, form, torch.bfloat16) for _ in range(2))
        for state in (found, expected):
            state["gradients"][0][300] = wrong
        same(updates(found, "native", seed=form.seed), updates(expected, "reference", seed=form.seed))
        assert found["params"][0][300].isnan()


def test_the_formula_is_torchs():
    """Within a few units in the last place: torch's fused update multiplies and adds in one rounding."""
    ours, torchs = (cases.state(10_007, cases.PLAIN, torch.float32) for _ in range(2))
    adamw(**ours, update=cases.UPDATE)
    cases.fused(*(torchs[name] for name in ("params", "gradients", "exp_avgs", "exp_avg_sqs")))
    for name in ("exp_avgs", "exp_avg_sqs", "params"):
        torch.testing.assert_close(ours[name][0], torchs[name][0], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("form", [cases.MASTER, cases.EIGHT_BITS], ids=lambda form: form.name)
def test_opcheck(name, form):
    state = cases.state(300, form, torch.bfloat16)
    moments = [state["exp_avgs"], state["exp_avg_sqs"], [], []]
    if form is cases.EIGHT_BITS:
        columns = [
            [getattr(x, part) for x in column] for part in ("codes", "absmax") for column in moments[:2]
        ]
        moments = columns
    arguments = (state["params"], state["gradients"], state["masters"], *moments, None, torch.zeros(1))
    numbers = (1.0, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, None, [0, 300, 0])
    torch.library.opcheck(torch.ops.pypar.adamw_update, (*arguments, *numbers, name))


def test_derivatives_and_vmap_are_refused():
    state = cases.state(5, cases.PLAIN, torch.float32)
    state["gradients"][0].requires_grad_()
    with pytest.raises(NotImplementedError, match="writes into a tensor and has no derivative"):
        adamw(**state, update=cases.UPDATE)
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="takes lists of tensors; call it in a loop"):
        torch.vmap(lambda p: adamw([p], [p + 1], [p + 0], [p + 0], cases.UPDATE))(x)


def test_strided_parameters_and_empty_ones():
    weight = torch.randn(6, 5).t()
    state = [torch.randn(6, 5).t() for _ in range(2)] + [torch.rand(6, 5).t()]
    other = [x.clone() for x in (weight, *state)]
    adamw([weight], [state[0]], [state[1]], [state[2]], cases.UPDATE, backend="native")
    adamw([other[0]], [other[1]], [other[2]], [other[3]], cases.UPDATE, backend="reference")
    assert torch.equal(weight, other[0])
    empty = [torch.zeros(0)]
    adamw(
        [*empty, torch.ones(3)],
        [*empty, torch.ones(3)],
        [*empty, torch.ones(3)],
        [*empty, torch.ones(3)],
        cases.UPDATE,
    )
    adamw([], [], [], [], cases.UPDATE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradients": [torch.zeros(4)]}, r"gradients holds a tensor \(4,\).* for a parameter \(5,\)"),
        ({"gradients": [torch.zeros(10)[::2]]}, "must lie alike in memory"),
        ({"gradients": []}, "gradients has 0 tensors, and params 1"),
        ({"exp_avgs": [zero_blocks(torch.zeros(5), signed=True)]}, "must both be tensors or both Blocks"),
        ({"scale": torch.ones(2)}, r"scale \(2,\) must be one number"),
        ({"places": []}, "a place for each of 1 params, and there are 0"),
        ({"gradients": [torch.zeros(5).double()], "backend": "native"}, "float64 is not one of"),
    ],
)
def test_bad_input_is_named(change, sentence):
    state = cases.state(5, cases.PLAIN, torch.float32)
    with pytest.raises(ValueError, match=sentence):
        adamw(**{**state, "update": cases.UPDATE, **change})


@pytest.mark.parametrize(
    "numbers", [{"step": 0, "lr": 1.0}, {"step": 1, "lr": -1.0}, {"step": 1, "lr": 1.0, "betas": (1.0, 0.9)}]
)
def test_numbers_out_of_bounds_are_named(numbers):
    with pytest.raises(ValueError, match="must"):
        Update(**numbers)


def test_kernels_take_both_moments_of_one_dtype():
    state = cases.state(63, cases.PLAIN, torch.float32)
    state["exp_avgs"] = [x.bfloat16() for x in state["exp_avgs"]]
    with pytest.raises(
        ValueError, match="refuses: exp_avgs are torch.bfloat16 and exp_avg_sqs torch.float32"
    ):
        updates(state, "native")
    updates(state, None)
