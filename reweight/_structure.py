"""What a model consists of, asked for once and kept until it changes."""

import weakref
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn


class Place(NamedTuple):
    """Where a module holds a tensor.

    Attributes:
        members: ``_parameters`` or ``_buffers`` of the module.
        key: what the tensor is called there.
        path: the name of this place in the model.
        name: the first name that the tensor goes by: the path of its first place.
    """

    members: dict[str, Tensor | None]
    key: str
    path: str
    name: str


_Held: TypeAlias = tuple[int, str, str, str, str]
"""The number of the module, and as in :class:`Place`."""


class Structure(NamedTuple):
    """A model as it is now.

    Attributes:
        modules: all of them, each once.
        parameters: by name, each once.
        buffers: likewise.
        held: what the places below are made of.
    """

    modules: list[nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    held: "list[_Held]"

    @property
    def places(self) -> list[Place]:
        """Where parameters and buffers are; a tensor of several names has several."""
        return [
            Place(getattr(self.modules[i], kind), key, path, name)
            for i, kind, key, path, name in self.held
        ]


def structure_of(model: nn.Module) -> Structure:
    """What was found the last time, if every module still has the same members by the same names.

    That takes one look at each; to collect them anew, several times as long.
    """
    kept = _KEPT.get(model)
    structure = None if kept is None else kept.structure()
    if structure is None:
        kept = _KEPT[model] = _Kept(model)
        structure = kept.structure()
    assert structure is not None
    return structure


class _Kept:
    """A structure that keeps nothing alive, or no model that is known here would ever be freed."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        modules = [module for _, module in named]
        self._modules = [weakref.ref(module) for module in modules]
        self._names, members = _members(modules)
        self._members = [_nothing if each is None else weakref.ref(each) for each in members]
        self._is_none = list(map(is_, members, repeat(None)))
        self._held: list[_Held] = []
        self._found: dict[str, dict[str, int]] = {"_parameters": {}, "_buffers": {}}
        first: dict[int, str] = {}
        number = 0  # of the member
        for i, (prefix, module) in enumerate(named):
            for kind in _PARTS:
                for key, member in getattr(module, kind).items():
                    if kind in self._found and member is not None:
                        path = f"{prefix}.{key}" if prefix else key
                        name = first.setdefault(id(member), path)
                        self._held.append((i, kind, key, path, name))
                        self._found[kind][name] = number
                    number += 1

    def structure(self) -> Structure | None:
        """It, or None if the model is another now."""
        modules: list[Any] = [reference() for reference in self._modules]
        if any(map(is_, modules, repeat(None))):
            return None
        names, members = _members(modules)
        known = [reference() for reference in self._members]
        # What is gone and what was None from the beginning look alike.
        is_none = list(map(is_, known, repeat(None)))
        if names != self._names or is_none != self._is_none or not all(map(is_, members, known)):
            return None
        parameters, buffers = (
            {name: members[number] for name, number in numbers.items()}
            for numbers in self._found.values()
        )
        return Structure(modules, parameters, buffers, self._held)


_PARTS = "_modules", "_parameters", "_buffers"


def _members(modules: list[nn.Module]) -> tuple[list[str], list[Any]]:
    """What modules hold themselves, the parts of each one after the other."""
    names: list[str] = []
    members: list[Any] = []
    for module in modules:
        for part in (module._modules, module._parameters, module._buffers):  # as in _PARTS
            if part:
                names += part.keys()
                members += part.values()
    return names, members


def _nothing() -> None:
    """In the place of a reference to None, to which there is none."""


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
