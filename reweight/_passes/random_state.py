"""The state of the random number generators, to be put back."""

import ctypes
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


class RandomState:
    """The state of the generators that may be drawn from, now.

    Those are the global ones of PyTorch, NumPy and Python, and those that are named.

    Args:
        devices: whose global generators are meant, besides the CPU's.
        generators: others.
    """

    _latest: "RandomState | None" = None  # NumPy's is taken from there if nothing was drawn since

    def __init__(
        self, devices: Iterable[torch.device], generators: Iterable[torch.Generator]
    ) -> None:
        self._python, self._bits, latest = random.getstate(), _numpy_bits(), RandomState._latest
        if latest is not None and latest._is_numpys(self._bits):
            self._numpy: Any = latest._numpy
        else:
            self._numpy, RandomState._latest = np.random.get_state(legacy=False), self
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
        if not self._is_numpys(_numpy_bits()):
            np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for generator, state in self._generators:
            generator.set_state(state)
        for device, state in self._others.items():
            getattr(torch, device.type).set_rng_state(state, device)

    def _is_numpys(self, bits: bytes) -> bool:
        """Whether NumPy is seen to be where it was; a normal number kept back can't be seen."""
        return bool(bits) and not self._numpy["has_gauss"] and self._bits == bits


def _numpy_bits() -> bytes:
    """What NumPy's generator draws from, where its memory is known; reading it takes a hundredth.

    PyTorch's and Python's are read and written quickly; NumPy's way goes number by number.
    """
    generator = getattr(np.random, "get_bit_generator", lambda: None)()  # from NumPy 1.24 on
    if type(generator) is not np.random.MT19937:
        return b""
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words and a position
