"""The loss of transformers' causal language models by `pypar.linear_cross_entropy`, without their logits.

Two modules change: the last linear layer, which gives the loss when it is given targets, and the model around it,
which gives them in training. Whatever gathers the layer's weight when it is called (hooks of FSDP, ZeRO or
accelerate) does so for the loss too.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pypar.hugging_face.fused.recognition import (
    Swap,
    Verdict,
    covered,
    device_of,
    difference,
    fused_class,
    is_same,
    known,
    numbers,
    stand_in,
    swap_of,
)
from pypar.tensor_parallel import ColumnParallelLinear
from pypar.tensor_parallel.linear_cross_entropy import linear_cross_entropy
from pypar.tensor_parallel.sharded import autocast

_MODELS = (  # whose ForCausalLM.forward is known
    "llama.LlamaForCausalLM",
    "deepseek_v3.DeepseekV3ForCausalLM",
    "gemma2.Gemma2ForCausalLM",
    "mixtral.MixtralForCausalLM",
)
_WIDTH = 4  # of the hidden state in a trial


def loss_verdicts(module: Any) -> dict[str, Verdict]:
    """Verdicts of a model with a loss, under "", and, where they are to change, of its last layer, under its name.

    Empty where the module is no such model, or none that pypar knows.
    """
    if swap_of(module) == _LOSS:  # the layer may have become another since
        return {"lm_head": Verdict(_HEAD)} if type(module.lm_head) is nn.Linear else {}
    if _model_like(type(module)) is None:
        return {}
    head, reason = module.lm_head, covered(module)
    if not reason and not _is_causal_loss(module):
        reason = "its loss_function is not ForCausalLMLoss"
    if not reason:
        reason = covered(head) if type(head) is nn.Linear else _head_obstacle(head)
    reason = reason or _difference(module)
    found = {"": Verdict(_LOSS, reason)}
    if not reason and type(head) is nn.Linear:
        found["lm_head"] = Verdict(_HEAD)
    return found


def _head_obstacle(head: nn.Module) -> str:
    """Why a last layer gives no loss; "" where it does."""
    name = type(head).__name__
    if isinstance(head, ColumnParallelLinear):
        if head.sequence_parallel or not head.gather_output:
            return f"its lm_head is a {name} that has a part of the positions, or gives a part of the logits"
        return f"its lm_head, a {name}, has hooks" if head._forward_pre_hooks or head._forward_hooks else ""
    if swap_of(head) == _HEAD:
        return ""
    return f"its lm_head is a {name}, which gives no loss"


def _model_like(original: type) -> str | None:
    """The model of transformers whose forward a class has, behind the one decorator that pypar knows."""
    forward: Any = getattr(original, "forward", None)
    for name in _MODELS:
        other = known(f"{name}.forward")
        if other is None:
            continue
        if _wrappers(forward) == _wrappers(other) and is_same(inspect.unwrap(forward), inspect.unwrap(other)):
            return name
    return None


def _wrappers(function: Any) -> list[Any]:
    """The code of what is wrapped around a function."""
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(getattr(function, "__code__", None))
        function = function.__wrapped__
    return found


def _is_causal_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def _with_targets(original: Any) -> Mapping[str, Any]:
    def forward(self: Any, x: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """nn.Linear, or, with targets [...] for each row of x, their loss; options: of `pypar.linear_cross_entropy`."""
        if targets is None:
            return original.forward(self, x)
        tensors: Any = autocast((x, self.weight, self.bias))
        hidden, weight, bias = tensors
        return linear_cross_entropy(hidden, weight, targets, bias=bias, **options)

    return {"forward": forward}


def _without_logits(original: Any) -> Mapping[str, Any]:
    whole = original.forward
    has_softcap = _model_like(original) == "gemma2.Gemma2ForCausalLM"
    balances = inspect.unwrap(whole).__globals__.get("load_balancing_loss_func")
    parameters = list(inspect.signature(whole).parameters.values())
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        if not self.training or labels is None or not _can_leave_logits_out(self, keep):
            return whole(self, *args, **kwargs)
        return_dict = given.pop("return_dict", None)
        if "output_router_logits" in names and given.get("output_router_logits") is None:
            given["output_router_logits"] = self.config.output_router_logits
        outputs = self.model(**given)
        softcap = self.config.final_logit_softcapping if has_softcap else None
        loss = _loss(self.lm_head, outputs.last_hidden_state, labels, softcap, given)
        found = {"loss": loss, "past_key_values": outputs.past_key_values}
        found |= {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        result = _output(self, found, outputs, given, balances)
        is_dict = self.config.return_dict if return_dict is None else return_dict
        return result if is_dict else result.to_tuple()

    described: Any = forward
    described.__signature__, described.__doc__ = inspect.signature(whole), whole.__doc__
    return {"forward": forward}


def _can_leave_logits_out(model: Any, logits_to_keep: Any) -> bool:
    """Whether what the loss is made of is what pypar knows; a warning where the last layer is not any more."""
    if not isinstance(logits_to_keep, int) or logits_to_keep or not _is_causal_loss(model):
        return False
    obstacle = _head_obstacle(model.lm_head)
    if obstacle:
        remedy = "; call pypar.apply_fused again" if type(model.lm_head) is nn.Linear else ""
        warnings.warn(
            f"{type(model).__name__} computes its loss from logits: {obstacle}{remedy}", stacklevel=3
        )
    return not obstacle


def _loss(
    head: Any, hidden: Tensor, labels: Tensor, softcap: float | None, given: Mapping[str, Any]
) -> Tensor:
    """What ForCausalLMLoss gives for the logits of hidden [B, T, H]: labels [B, T], or given["shift_labels"]."""
    num_items, ignored = given.get("num_items_in_batch"), given.get("ignore_index", -100)
    targets = given.get("shift_labels")
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
    options: dict[str, Any] = {
        "ignore_index": ignored,
        "softcap": softcap,
        "reduction": "mean" if num_items is None else "sum",
    }
    targets = targets.reshape(hidden.shape[:-1]).to(hidden.device)
    if isinstance(head, ColumnParallelLinear):
        tensors: Any = autocast((hidden, head.part("weight"), head.part("bias")))
        hidden, weight, bias = tensors
        loss = linear_cross_entropy(hidden, weight, targets, group=head.axis, bias=bias, **options)
    else:
        loss = head(hidden, targets, **options)
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def _output(model: Any, found: dict[str, Any], outputs: Any, given: Mapping[str, Any], balances: Any) -> Any:
    """transformers' record of results, of which a mixture of experts has its own."""
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    if not hasattr(outputs, "router_logits"):
        return CausalLMOutputWithPast(**found)
    aux_loss = None
    if balances is not None and given.get("output_router_logits"):
        aux_loss = balances(
            outputs.router_logits, model.num_experts, model.num_experts_per_tok, given.get("attention_mask")
        )
        found["loss"] = found["loss"] + model.router_aux_loss_coef * aux_loss.to(found["loss"].device)
    return MoeCausalLMOutputWithPast(aux_loss=aux_loss, router_logits=outputs.router_logits, **found)


_LOSS = Swap("loss", "pypar.linear_cross_entropy in training, without logits", _without_logits)
_HEAD = Swap("last layer", "pypar.linear_cross_entropy where it is given targets", _with_targets)


class _Trunk(nn.Module):
    """In a trial, a model that gives a hidden state [2, 3, H] that is already there."""

    def __init__(self, hidden: Tensor, router_logits: Tensor | None) -> None:
        super().__init__()
        found = {
            "last_hidden_state": hidden,
            "past_key_values": None,
            "hidden_states": None,
            "attentions": None,
        }
        self.outputs = SimpleNamespace(**found)
        if router_logits is not None:
            self.outputs.router_logits = (router_logits,)

    def forward(self, **given: Any) -> Any:
        return self.outputs


def _difference(model: Any) -> str:
    """How the two losses of a small hidden state and weight differ: a mean, and a sum over a number of tokens."""
    original = type(model)
    fused, name = fused_class(original, _LOSS), _model_like(original)
    V = model.config.vocab_size
    options: dict[str, Any] = {}
    router_logits = None
    if name == "mixtral.MixtralForCausalLM":
        options["output_router_logits"] = True
    if name in ("mixtral.MixtralForCausalLM", "deepseek_v3.DeepseekV3ForCausalLM"):
        router_logits = numbers(6, getattr(model, "num_experts", 2), seed=2, device=device_of(model))
    hidden, weight = (numbers(*shape, _WIDTH, seed=V, device=device_of(model)) for shape in ((2, 3), (V,)))
    labels = torch.tensor([[0, V - 1, 0], [0, -100, V - 1]], device=hidden.device)

    def of(forward: Any, **more: Any) -> Any:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            head: Any = nn.Linear(1, 1, bias=False, device="meta")
            head.weight = None
            head.__dict__["weight"] = weight
            head.__class__ = fused_class(nn.Linear, _HEAD)
            small = stand_in(model, {}, {"model": _Trunk(hidden, router_logits), "lm_head": head})
            small.training = True
            return forward(small, labels=labels, return_dict=True, **options, **more).loss

        return loss

    for more in ({}, {"num_items_in_batch": 7}):
        reason = difference(of(original.forward, **more), of(fused.forward, **more), hidden, weight)
        if reason:
            return reason
    return ""
