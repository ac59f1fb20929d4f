"""What a pass begins with and may change, to be put back: buffers, random state, gradients."""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class RandomState:
    """The state of the generators that may be drawn from, now.

    Those are the global ones of PyTorch, NumPy and Python, and those that are named.

    Args:
        devices: whose global generators are meant, besides the CPU's.
        generators: others.
    """

    def __init__(
        self, devices: Iterable[torch.device], generators: Iterable[torch.Generator]
    ) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._others = {
            device: getattr(torch, device.type).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Put the generators back to where they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for generator, state in self._generators:
            generator.set_state(state)
        for device, state in self._others.items():
            getattr(torch, device.type).set_rng_state(state, device)


class Beginning:
    """What a forward begins with and may change, now.

    Those are the buffers, the random state, what modules keep in plain attributes (their
    ``torch.Generator`` objects, tensors, containers and whatever else stands there), and with these
    their hooks and submodules: some are set up by the first forward, which notes so in a flag.

    Args:
        model: looked at now.

    Attributes:
        buffers: copies, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._random_state = RandomState((p.device for p in model.parameters()), ())
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        values = dict(zip(map(id, model.buffers()), self.buffers.values(), strict=True))
        self._places: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._structure: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for module in model.modules():
            self._places += [
                (module, name, buffer, values[id(buffer)])
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]
            parts = (vars(module).get(name) for name in _STRUCTURE)
            self._structure += [(part, part.copy()) for part in parts if part is not None]
            plain = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
            self._attributes.append((module, plain))
            self._contents += [
                (value, contents)
                for value in plain.values()
                if (contents := _contents(value)) is not None
            ]

    def replay(self) -> None:
        """Random state and attributes as they were; the buffers of a pass are copies anyway."""
        self._random_state.restore()
        for module, plain in self._attributes:
            held = vars(module)
            for name in held.keys() - plain.keys() - _OF_EVERY_MODULE:
                del held[name]
            held.update(plain)
        for value, contents in self._contents:
            _put_back(value, contents)
        for part, before in self._structure:
            if part != before:
                part.clear()
                part.update(before)

    def restore(self) -> None:
        """All of it as it was.

        Buffers through ``data``, for a graph that holds one would take any change for one that
        spoils it, even the change back.
        """
        self.replay()
        for module, name, buffer, value in self._places:
            buffer.data.copy_(value)
            module._buffers[name] = buffer


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_STRUCTURE = [
    name
    for name in _OF_EVERY_MODULE
    if name == "_modules" or name.startswith(("_forward_", "_backward_"))
]


def _contents(value: Any) -> Any:
    """What an attribute holds that may change in place; None if that is not known to."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, list | dict | set | deque):
        return value.copy()
    # One with a graph, as of activations kept for later, is not changed but replaced.
    is_state = type(value) is Tensor and not (value.requires_grad or value.is_inference())
    return (value.clone(), value._version) if is_state else None


def _put_back(value: Any, contents: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(contents)
    elif isinstance(value, Tensor):
        if value._version != contents[1]:
            value.data.copy_(contents[0])
    elif _identities(value) != _identities(contents):
        value.clear()
        (value.update if isinstance(value, dict | set) else value.extend)(contents)


def _identities(container: Any) -> list[int]:
    values = container.values() if isinstance(container, dict) else ()
    return [*map(id, container), *map(id, values)]


class Gradients:
    """What ``.grad`` of these parameters holds, now.

    Args:
        parameters: looked at now.
        copy: whether gradients that are there already are copied, for a backward that adds to them.
    """

    def __init__(self, parameters: Iterable[Tensor], *, copy: bool = False) -> None:
        self._gradients = [
            (p, p.grad.clone() if copy and p.grad is not None else p.grad) for p in parameters
        ]

    def clear(self) -> None:
        """Take them away."""
        for parameter, _ in self._gradients:
            parameter.grad = None

    @contextmanager
    def taken_away(self) -> Iterator[None]:
        """Without them, and with them again afterwards."""
        self.clear()
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Put them back."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
