"""`apply_fused`: pypar's operators in an unmodified model of Hugging Face transformers."""

from __future__ import annotations

import re

from torch import nn

from pypar.hugging_face.fused.gates import gate_verdict
from pypar.hugging_face.fused.loss import loss_verdicts
from pypar.hugging_face.fused.norms import norm_verdict
from pypar.hugging_face.fused.recognition import Swap, Verdict, fused_class, swap_of
from pypar.hugging_face.fused.report import FusedReport, Line
from pypar.hugging_face.fused.rotary import rotary_verdict, tables_for

__all__ = ["FusedReport", "apply_fused"]

# Classes that are named in the report if nothing of them is known. Names decide nothing else.
_WORTH_NAMING = re.compile(r"Norm|MLP|FeedForward|Experts$|Attention$|ForCausalLM$")
_FEED_FORWARD = re.compile(r"MLP|FeedForward|Experts$")


def apply_fused(model: nn.Module, *, loss: bool = True) -> FusedReport:
    """Puts pypar's operators in the place of norms, rotary embeddings, gated activations and the loss, in place.

    model: a causal language model of transformers, or a module with one in it, on any device, meta too. Parameters,
    their names, hooks, submodules and saved files stay as they are; values and gradients are the same up to rounding
    (in bf16 there are fewer roundings). A module's class becomes a subclass of its class, with the same name; nothing
    of the library or of other models changes. A module is swapped if its code is, instruction by instruction, code
    that pypar knows, and if both compute the same in a trial with a few random numbers. All else is left.

    Returns a report, `print` of which says what was swapped and what was left, and why. A second call finds what the
    first one did.

    loss: whether the loss is swapped too. Then a model in training mode that is given labels returns no logits
    (``output.logits is None``; `torch.nn.Module.eval`, or no labels, gives them as ever), and its loss is 0 where every
    label is ignored, not NaN. Of ``logits_to_keep`` and another ``loss_function`` it makes logits.

    Before or after `pypar.parallelize`.

    ValueError: a model of which nothing is known, and which is then unchanged. ImportError without transformers.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"apply_fused changes models of transformers ({error}); pip install transformers"
        ) from error
    report, changes = _looked_at(model, loss)
    if not report.swapped and not report.before:
        reasons = "".join(f"; {line}: {line.text}" for line in report.left)
        raise ValueError(
            f"apply_fused knows no norm, rotary embedding, gated activation or loss of this {type(model).__name__}"
            f"{reasons}; give a causal language model of transformers"
        )
    for module, swap in changes:
        module.__class__ = fused_class(type(module), swap)
    return report


def _looked_at(model: nn.Module, loss: bool) -> tuple[FusedReport, list[tuple[nn.Module, Swap]]]:
    """What there is to say of a model, which is not changed yet, and what to change."""
    swapped, left, before = _Lines(), _Lines(), _Lines()
    changes = []
    for name, module in model.named_modules():
        earlier = swap_of(module)
        verdicts = _verdicts(name, module, model, loss)
        if earlier is not None:
            before.add(earlier.part, module, name, earlier.operator)
        elif not verdicts and _is_worth_naming(module):
            left.add("code", module, name, "pypar does not know it")
        for child, verdict in verdicts.items():
            place = f"{name}.{child}".strip(".")
            part = module.get_submodule(child)
            if verdict.reason:
                left.add(verdict.swap.part, part, place, verdict.reason)
            else:
                swapped.add(verdict.swap.part, part, place, verdict.swap.operator)
                changes.append((part, verdict.swap))
    return FusedReport(type(model).__name__, swapped.lines(), left.lines(), before.lines()), changes


def _verdicts(name: str, module: nn.Module, model: nn.Module, loss: bool) -> dict[str, Verdict]:
    """The verdict on a module, under "", and those on its children, under their names."""
    verdicts = loss_verdicts(module) if loss else {}
    if swap_of(module) is not None:
        return verdicts
    own = (
        norm_verdict(module)
        or gate_verdict(module)
        or rotary_verdict(module, lambda: tables_for(name, model))
    )
    return verdicts if own is None else {"": own}


def _is_worth_naming(module: nn.Module) -> bool:
    """A feed-forward block that holds others, as one that routes to experts, is named by these."""
    if not _WORTH_NAMING.search(type(module).__name__):
        return False
    inner = [type(each).__name__ for each in module.modules() if each is not module]
    return not _FEED_FORWARD.search(type(module).__name__) or not any(map(_FEED_FORWARD.search, inner))


class _Lines:
    """Lines of a report in the making: modules of one class with one text share a line."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str, str], list[str]] = {}

    def add(self, part: str, module: nn.Module, name: str, text: str) -> None:
        self.names.setdefault((part, type(module).__name__, text), []).append(name)

    def lines(self) -> tuple[Line, ...]:
        return tuple(
            Line(part, class_name, tuple(names), text)
            for (part, class_name, text), names in self.names.items()
        )
