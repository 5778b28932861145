"""What a run asks of a family of models: the keys of its section, its sizes, its class. It needs no torch.

A family is a `ModelSection` with its keys, a dataclass of sizes, and a model made from them:

    sizes = section.sizes(vocab_size)                  every size known
    model = section.model_class()(sizes, seed=None, dtype=dtype)
    model.initial_weight(seed)                         (name, shape) -> the whole first value of a weight
    model.parallel_plan                                how it is spread; the class says it
    model.blocks()                                     its pipeline stages
    model(tokens, sequences=.., cache=..)              logits, cut over the ranks of tensor parallelism by the plan
    model(tokens, sequences=.., targets=..)            where forward has this keyword: the sum of the targets' loss

`pypar.models.families` lists all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pypar.settings import Section, of_kind, setting


class Sizes(Protocol):
    """A dataclass of the sizes of a whole model, whose fields are keys of the family's section."""

    # Keys that may be 0 in a section, as the tokenizer or other sizes give their values.
    filled_in: ClassVar[tuple[str, ...]]

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        ...

    @property
    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of weights from which a reader knows a model before it is made."""
        ...

    def flops_per_token(self, length: int) -> int:
        """FLOPs of training a token of a sequence of this length."""
        ...


def _families() -> Iterable[str]:
    from pypar.models.families import FAMILIES

    return FAMILIES


@dataclass(frozen=True)
class ModelSection(Section):
    """The section ``model``, whose other keys are those of the family."""

    family: str = setting(
        "decoder", choices=_families, help="which keys this section has, and which model they make"
    )

    @classmethod
    def section_for(cls, values: Mapping[str, Any]) -> type[Section]:
        """The section of the family that ``values`` name. ValueError where there is none of that name."""
        from pypar.models.families import FAMILIES

        name = of_kind("model.family", values.get("family", "decoder"), str)
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, 1, 0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"model.family {name!r} is not one of {', '.join(sorted(FAMILIES))}{hint}")
        return FAMILIES[name]

    def sizes(self, vocab_size: int) -> Sizes:
        """The model's sizes with every 0 filled in; ``vocab_size`` is the tokenizer's."""
        raise NotImplementedError

    def filled(self, vocab_size: int) -> ModelSection:
        """The section with every 0 filled in, for `check`."""
        raise NotImplementedError

    def model_class(self) -> Any:
        """The class of the model, which is imported here."""
        raise NotImplementedError
