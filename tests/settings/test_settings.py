"""Sections of a configuration: bounds, choices and rules that stand at the field."""

from dataclasses import dataclass

import pytest

from pypar.settings import Run, Section, check_values, keys_of, num_bytes, section_of, sections_of, setting


def _colours():
    return ["blue", "red"]


def _never():
    raise AssertionError("the default needs no registry")


@dataclass(frozen=True)
class Paint(Section):
    layers: int = setting(2, at_least=1, at_most=4, help="how many")
    share: float = setting(0.5, above=0, below=1, help="of the can")
    colour: str = setting("red", choices=_colours, help="the pigment")
    finish: str = setting("matt", choices=_never, help="the surface")

    def check(self, run):
        return ["thin"] if self.layers < run.num_layers else []


@dataclass(frozen=True)
class House:
    number: int = setting(1, help="in the street")
    paint: Paint = section_of(Paint)


def test_keys_and_what_they_say_of_themselves():
    keys = {key.name: key for key in keys_of(House)}
    assert list(keys) == ["number", "paint.layers", "paint.share", "paint.colour", "paint.finish"]
    assert keys["paint.layers"].values() == "a whole number at least 1 and at most 4"
    assert keys["paint.share"].values() == "a number greater than 0 and less than 1"
    assert keys["paint.colour"].values() == '"red", "blue"'  # the default first
    assert keys["number"].values() == "a whole number"


def test_defaults_pass_and_open_no_registry():
    check_values(House())


@pytest.mark.parametrize(
    ("paint", "sentence"),
    [
        (Paint(layers=0), "paint.layers (0) must be at least 1 and at most 4"),
        (Paint(layers=5), "paint.layers (5) must be at least 1 and at most 4"),
        (Paint(share=0.0), "paint.share (0.0) must be greater than 0 and less than 1"),
        (Paint(share=1.0), "paint.share (1.0) must be greater than 0 and less than 1"),
        (Paint(share=float("nan")), "paint.share (nan) must be a finite number"),
        (Paint(colour="bleu"), "paint.colour 'bleu' is not one of red, blue; did you mean 'blue'?"),
        (Paint(colour=3), "configuration key 'paint.colour' must be text, not 3"),
        (Paint(layers=True), "configuration key 'paint.layers' must be a whole number, not True"),
    ],
)
def test_a_value_that_breaks_its_rule(paint, sentence):
    with pytest.raises(ValueError) as refused:
        check_values(House(paint=paint))
    assert str(refused.value) == sentence


@pytest.mark.parametrize("value", [1, 4])
def test_bounds_that_may_be_reached(value):
    check_values(House(paint=Paint(layers=value)))


def test_sections_say_what_they_think_of_a_run():
    run = Run({"tp": 1}, num_layers=3, num_heads=4, sequence_length=8, num_positions=[8], num_microbatches=2)
    assert [note for section in sections_of(House()) for note in section.check(run)] == ["thin"]


def test_a_setting_without_an_explanation():
    with pytest.raises(TypeError, match="help"):
        setting(1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (7, 7),
        ("2000", 2000),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("512 mib", 512 << 20),
        ("0.5KB", 500),
    ],
)
def test_numbers_of_bytes_as_text(text, expected):
    assert num_bytes(text) == expected


@pytest.mark.parametrize("text", ["GB", "-1GB", "2 gigs", "1e9", ""])
def test_text_that_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(
        ValueError, match=f"{text!r} is no number of bytes; write a number and one of B, KB, KiB"
    ):
        num_bytes(text)
