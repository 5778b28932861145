"""Ways in which people use a model: each stage trains them with the bits of stage 0, which are those of one process."""

import pytest

from tests.data_parallel.zero.programs import PROGRAMS, Program
from tests.data_parallel.zero.training import Script, assert_close, assert_same_bits, train

FORMS = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 keeps": {"stage": 3, "reshard": False},
}
# A few of which every program runs one, and programs that are beside each other run different ones.
QUICK = (
    ("3", "two microbatches"),
    ("3 keeps", "one microbatch"),
    ("3", "one microbatch"),
    ("2", "two microbatches"),
)
SCRIPTS = {
    "one microbatch": Script(clip=10.0),
    "two microbatches": Script(num_microbatches=2, num_steps=4, clip=10.0),
}


def cases():
    for index, name in enumerate(PROGRAMS):
        for form in FORMS:
            for script in SCRIPTS:
                marks = () if (form, script) == QUICK[index % len(QUICK)] else pytest.mark.slow
                yield pytest.param(name, form, script, marks=marks)


@pytest.mark.parametrize(("name", "form", "script"), list(cases()))
def test_programs_have_the_bits_of_stage_0(ranks, name, form, script):
    work, script = Program(name), SCRIPTS[script]
    expected = ranks(2, train, work, {"dp": 2}, {"stage": 0}, script)
    assert_close(expected, work, script)
    assert_same_bits(ranks(2, train, work, {"dp": 2}, FORMS[form], script), expected)
