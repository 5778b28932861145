"""Every stage of `pypar.zero` trains with the bits of stage 0, and stage 0 trains as one process does."""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests.data_parallel.zero.training import STAGES, Script, assert_close, assert_same_bits, train
from tests.data_parallel.zero.trees import HALF, everything, trees
from tests.harness.pairs import pairwise

WORLDS = (1, 2, 3, 4)
# "half": as many ranks as half of them, or one where they are odd.
FORMS = {name: form for name, form in STAGES.items() if name != "0"} | {
    "3 keeps parts": {"stage": 3, "reshard": "half"},
    "1 hybrid": {"stage": 1, "shard_size": "half"},
    "2 hybrid": {"stage": 2, "shard_size": "half"},
    "3 hybrid": {"stage": 3, "shard_size": "half"},
    "3 in small buckets": {"stage": 3, "bucket_bytes": 64},
}
SCRIPTS = {
    "one microbatch": Script(),
    "three microbatches": Script(num_microbatches=3),
    "momentum": Script(num_microbatches=2, optimizer="momentum"),
}


def options_of(form, world_size, dtype=None):
    half = world_size // 2 if world_size % 2 == 0 else 1
    return {key: half if value == "half" else value for key, value in FORMS[form].items()} | {"dtype": dtype}


@pytest.fixture(scope="module")
def stage_0(ranks):
    """Steps of stage 0: (tree, sizes of the mesh, script, dtype), made once for each setting."""

    @functools.cache
    def made(tree, sizes, script, dtype):
        world_size = functools.reduce(int.__mul__, dict(sizes).values(), 1)
        return ranks(world_size, train, tree, dict(sizes), {"stage": 0, "dtype": dtype}, script)

    return lambda tree, sizes, script, dtype=None: made(tree, tuple(sizes.items()), script, dtype)


@pytest.mark.parametrize(
    ("world_size", "form", "script", "recompute", "dtype"),
    pairwise(WORLDS, FORMS, SCRIPTS, ("no", "inside", "outside"), (None, HALF)),
)
def test_stages_have_the_bits_of_stage_0(ranks, stage_0, world_size, form, script, recompute, dtype):
    """Sizes that divide nothing, parameters of every kind, with data of its own on every rank."""
    tree, sizes, script = everything(recompute), {"dp": world_size}, SCRIPTS[script]
    steps = ranks(world_size, train, tree, sizes, options_of(form, world_size, dtype), script)
    assert_same_bits(steps, stage_0(tree, sizes, script, dtype))


@pytest.mark.parametrize("sizes", [{"dp": 2, "cp": 2}, {"cp": 2}], ids=str)
@pytest.mark.parametrize("form", ["1", "3"])
def test_data_are_spread_over_cp_too(ranks, stage_0, sizes, form):
    world_size = sizes.get("dp", 1) * sizes["cp"]
    tree, script = everything(), SCRIPTS["three microbatches"]
    steps = ranks(world_size, train, tree, sizes, options_of(form, world_size), script)
    assert_same_bits(steps, stage_0(tree, sizes, script))
    assert_same_bits(steps, stage_0(tree, {"dp": world_size}, script))


@pytest.mark.parametrize(
    ("world_size", "script", "dtype"), pairwise(WORLDS[:3], SCRIPTS, (None, HALF)), ids=str
)
def test_stage_0_trains_as_one_process(stage_0, world_size, script, dtype):
    """Without it the tests above could be green because all stages do the same wrong thing."""
    tree, script = everything(), SCRIPTS[script]
    assert_close(stage_0(tree, {"dp": world_size}, script, dtype), tree, script, dtype)


@some.composite
def cases(draw):
    """(tree, ranks, form, script, dtype)"""
    script = Script(draw(some.integers(1, 3)), draw(some.sampled_from(["adamw", "momentum"])))
    form, dtype = draw(some.sampled_from(sorted(FORMS))), draw(some.sampled_from([None, None, HALF]))
    return draw(trees()), draw(some.sampled_from(WORLDS)), form, script, dtype


def random_cases(max_examples):
    """The same trees each time: what a run finds, the next one finds too."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=slow, database=None
    )


def check(ranks, case):
    tree, world_size, form, script, dtype = case
    sizes = {"dp": world_size}
    expected = ranks(world_size, train, tree, sizes, {"stage": 0, "dtype": dtype}, script)
    assert_close(expected, tree, script, dtype)
    assert_same_bits(
        ranks(world_size, train, tree, sizes, options_of(form, world_size, dtype), script), expected
    )


@random_cases(15)
@given(case=cases())
def test_random_trees_have_the_bits_of_stage_0(ranks, case):
    check(ranks, case)


@pytest.mark.slow
@random_cases(400)
@given(case=cases())
def test_many_random_trees_have_the_bits_of_stage_0(ranks, case):
    check(ranks, case)
