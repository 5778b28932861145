"""What a forward depends on beside its arguments, so that it can be run again in the same surroundings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode


@dataclass
class Environment:
    """Autocast, torch's function modes and, where random numbers were drawn, the states of torch's generators.

    autocast     by kind of device: (is on, its dtype, whether it caches)
    generators   torch's own generator of each device in use, with its state before the forward
    """

    autocast: dict[str, tuple[bool, torch.dtype, bool]]
    modes: list[Any]
    generators: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> Environment:
        """Of this thread, as far as it matters to operators on the devices of these tensors and on the CPU."""
        devices = {x.device for x in tensors if x.device.type != "cpu"}
        kinds = {"cpu", *(device.type for device in devices if torch.amp.is_autocast_available(device.type))}
        generators: list[torch.Generator] = []
        # Fake tensors have no values, and states of generators are no fake tensors.
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            generators.append(torch.default_generator)
            generators += [torch.cuda.default_generators[d.index] for d in devices if d.type == "cuda"]
        return cls(
            {kind: _autocast(kind) for kind in kinds},
            _get_current_function_mode_stack(),
            [(generator, generator.get_state()) for generator in generators],
        )

    def forget_unused(self) -> None:
        """After the forward: of generators that gave no number nothing is kept."""
        drawn = [(g, state) for g, state in self.generators if not torch.equal(g.get_state(), state)]
        self.generators = drawn

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, it is as it was; afterwards, generators and all else are as they were before."""
        with contextlib.ExitStack() as stack:
            for kind, (is_on, dtype, caches) in self.autocast.items():
                if is_on or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, is_on, caches))
            present = _get_current_function_mode_stack()
            for mode in self.modes:
                if not any(mode is other for other in present):
                    _push_mode(mode)
                    stack.callback(_pop_mode)
            for generator, state in self.generators:
                stack.callback(generator.set_state, generator.get_state())
                generator.set_state(state)
            yield


def _autocast(kind: str) -> tuple[bool, torch.dtype, bool]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
