"""What a pass begins with and may change, to be put back: random state, buffers, ``.grad``."""

import random
from collections.abc import Iterable

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

    @classmethod
    def of(cls, model: nn.Module) -> "RandomState":
        """Of the model's devices, and of ``torch.Generator`` attributes of its modules."""
        attributes = (value for module in model.modules() for value in vars(module).values())
        return cls(
            (parameter.device for parameter in model.parameters()),
            [value for value in attributes if isinstance(value, torch.Generator)],
        )

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
    """What a forward begins with and may change: buffers and random state, now.

    Args:
        model: looked at now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.random_state = RandomState.of(model)
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        values = dict(zip(map(id, model.buffers()), self.buffers.values(), strict=True))
        self._places = [
            (module, name, buffer, values[id(buffer)])
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Put both back to where they were.

        Through ``data``, for a graph that holds a buffer would take any change for one that spoils
        it, even the change back.
        """
        self.random_state.restore()
        for module, name, buffer, value in self._places:
            buffer.data.copy_(value)
            module._buffers[name] = buffer


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

    def restore(self) -> None:
        """Put them back."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
