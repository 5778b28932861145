"""Settings: keys of a configuration whose bounds, choices and explanation stand at their field.

A room that can be configured has a section: a frozen dataclass, derived from `Section`, whose fields are made by
`setting`. Making a section checks nothing: `check_values` holds every value to the rule at its field, and a section's
`check` holds the values to each other and to the mesh. `pypar.train.preflight` calls both before a rank is started.
This file needs no torch, so that a mistake in a configuration is answered at once.

    @dataclass(frozen=True)
    class OptimizerConfig(Section):
        lr: float = setting(3e-3, above=0, help="the learning rate after warm-up")
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_RULE = "pypar.rule"


@dataclass(frozen=True)
class Rule:
    """What a value must keep, and what its key is for. Bounds that are None are no bounds.

    choices: the values that there are, or a function that gives them, which is called only for a value that is not
    the default, as a registry may be slow to import. refuse(key, value) raises ValueError for what it does not take.
    resumed: what a change means for a run that goes on from a checkpoint; None where it changes nothing in the run.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None
    refuse: Callable[[str, Any], None] | None = None
    resumed: str | None = ""

    def bounds(self) -> str:
        """The bounds in words; "" where there are none."""
        words = {
            "greater than": self.above,
            "at least": self.at_least,
            "less than": self.below,
            "at most": self.at_most,
        }
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)

    def choices_from(self, default: Any) -> list[str]:
        """The choices, the default first; [] where every value will do."""
        given = self.choices() if callable(self.choices) else self.choices or ()
        return sorted(given, key=lambda choice: choice != default)

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any, **rule: Any) -> Any:
    """A field of a `Section`; ``rule`` are the fields of `Rule`, of which ``help`` is due."""
    return dataclasses.field(default=default, metadata={_RULE: Rule(**rule)})


def section_of(cls: type) -> Any:
    """A field that is a section, at its defaults where nothing is given."""
    return dataclasses.field(default_factory=cls)


@dataclass(frozen=True)
class Run:
    """What a section may ask about the run that it is part of.

    axes: the size of every axis of the mesh, of refinements and folds too. num_heads: query heads of one rank; it and
    num_layers are None for a model that the configuration does not describe. num_positions: of each rank that shares a
    sequence with others. num_microbatches: of one data rank in a step.
    """

    axes: Mapping[str, int]
    num_layers: int | None
    num_heads: int | None
    sequence_length: int
    num_positions: Sequence[int]
    num_microbatches: int


@dataclass(frozen=True)
class Section:
    """The keys of one room. Bounds and choices are checked from the fields; `check` is for rules between keys.

    resumed: as in `Rule`, for the keys of the section that do not say it themselves.
    """

    resumed: ClassVar[str] = ""

    @classmethod
    def section_for(cls, values: Mapping[str, Any]) -> "type[Section]":
        """The class of the section that these values are for: itself, where a value does not choose among several."""
        return cls

    def check(self, run: Run) -> Sequence[str]:
        """Notes on what runs, but not well. ValueError, before a rank is started, for what could not run."""
        return ()


@dataclass(frozen=True)
class Key:
    """One key of a configuration: its dotted name, the type of its values, its default, its rule.

    resumed: as in `Rule`, its own or its section's.
    """

    name: str
    kind: type
    default: Any
    rule: Rule
    resumed: str | None

    def check(self, value: Any) -> None:
        """ValueError where ``value`` is not of the key's type or breaks its rule."""
        key, rule = self.name, self.rule
        of_kind(key, value, self.kind)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} ({value}) must be a finite number")
        if type(value) in (int, float) and not rule.holds(value):
            raise ValueError(f"{key} ({value}) must be {rule.bounds()}")
        if rule.choices is not None and value != self.default:
            choices = rule.choices_from(self.default)
            if value not in choices:
                near = difflib.get_close_matches(value, choices, 1, 0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{key} {value!r} is not one of {', '.join(choices)}{hint}")
        if rule.refuse is not None:
            rule.refuse(key, value)

    def values(self) -> str:
        """The values that there are, in words: choices, bounds, or the type."""
        choices = [f'"{choice}"' for choice in self.rule.choices_from(self.default)]
        return ", ".join(choices) or " ".join(filter(None, [type_name(self.kind), self.rule.bounds()]))


def keys_of(config: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration, those of its sections too; of a class: of the sections that it has by default."""
    cls = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _RULE in field.metadata:
            rule = field.metadata[_RULE]
            of_section = getattr(cls, "resumed", "")
            resumed = of_section if rule.resumed == "" else rule.resumed
            yield Key(prefix + field.name, hints[field.name], field.default, rule, resumed)
        else:
            section = field.default_factory if config is cls else getattr(config, field.name)
            yield from keys_of(section, f"{prefix}{field.name}.")


def sections_of(config: Any) -> Iterator[Section]:
    """The sections of a configuration, in the order of its fields."""
    values = (getattr(config, field.name) for field in dataclasses.fields(config))
    yield from (value for value in values if isinstance(value, Section))


def check_values(config: Any) -> None:
    """ValueError where the value of a key breaks the rule that stands at its field."""
    for key in keys_of(config):
        value = config
        for name in key.name.split("."):
            value = getattr(value, name)
        key.check(value)


def _kinds(kind: Any) -> tuple[type, ...]:
    """The types of a key's values: one, or those of `bool | int`."""
    return kind.__args__ if isinstance(kind, types.UnionType) else (kind,)


def type_name(kind: type) -> str:
    """A type, or several of which a value has one, in words."""
    return ", or ".join(TYPE_NAMES[each] for each in _kinds(kind))


def of_kind(key: str, value: Any, kind: type) -> Any:
    """``value`` as a key of this type takes it: a whole number is a number. ValueError for another type."""
    if kind is float and type(value) is int and abs(value) < 1 << 1000:  # a larger one may be no float
        return float(value)
    if type(value) not in _kinds(kind):
        raise ValueError(f"configuration key {key!r} must be {type_name(kind)}, not {value!r}")
    return value


_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("i", 1024))
}


def num_bytes(text: str | int) -> int:
    """A number of bytes: 2000000000, "2GB" (1000^3 each), "1.5 GiB" (1024^3 each). ValueError for anything else."""
    if type(text) is int:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    units = {unit.upper(): size for unit, size in _UNITS.items()}
    if found is None or found[2].upper() not in units:
        names = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f'{text!r} is no number of bytes; write a number and one of {names}, like "2GB"')
    return int(float(found[1]) * units[found[2].upper()])


def check_num_bytes(key: str, text: str) -> None:
    """ValueError where a key's text is neither empty nor a number of bytes: a rule's ``refuse``."""
    if text:
        try:
            num_bytes(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def check_whole_number(name: str, value: object, at_least: int) -> None:
    """ValueError where an argument is no whole number, or is below the least one."""
    if type(value) is not int or value < at_least:
        raise ValueError(f"{name} ({value!r}) must be a whole number of at least {at_least}")


def check_divides(key: str, value: int, unit: int, by: str) -> None:
    """ValueError where ``unit``, which is ``by`` in words, does not divide the value of a key."""
    if value % unit:
        raise ValueError(f"{key} ({value}) must divide by {by} ({unit}); use {multiples_near(value, unit)}")


def multiples_near(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``, in words."""
    down, up = value - value % unit, value - value % unit + unit
    return f"{down} or {up}" if down else str(up)
