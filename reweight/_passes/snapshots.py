"""What a pass begins with and may change, to be put back: buffers, attributes, gradients."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reweight._passes.memory import is_plain
from reweight._passes.random_state import RandomState
from reweight._structure import structure_of

T = TypeVar("T")


class Beginning:
    """What a forward begins with and may change, now.

    Those are the buffers, the random state, what modules keep in attributes (their
    ``torch.Generator`` objects, tensors, containers and whatever else stands there), and with these
    their hooks and submodules: some are set up by the first forward, which notes so in a flag.

    Args:
        model: looked at now.

    Attributes:
        buffers: copies, by name.
        devices: those of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        structure = structure_of(model)
        buffers = structure.buffers
        self.devices = {parameter.device for parameter in structure.parameters.values()}
        self._random_state = RandomState(self.devices, ())
        self.buffers = clones(buffers)
        self._places = [
            (members, key, buffers[name], self.buffers[name])
            for members, key, _, name in (structure.places if buffers else ())
            if name in buffers
        ]
        self._attributes = [(held, held.copy()) for held in map(vars, structure.modules)]
        self._empty: list[Any] = []
        self._contents: list[tuple[Any, Any]] = []
        seen = set[int]()
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                kind = type(value)
                if kind in _OFTEN_EMPTY and not value:
                    self._empty.append(value)
                elif kind not in _CONSTANT and name not in ("_parameters", "_buffers"):
                    self._note(value, seen, is_opened=name != "_modules")

    def _note(self, value: Any, seen: set[int], *, is_opened: bool = True) -> None:
        """Keep what it holds, and what its elements do."""
        if (contents := _contents(value)) is not None:
            self._contents.append((value, contents))
        holds = isinstance(value, (*_CONTAINERS, tuple)) and len(value) <= _MANY
        if is_opened and holds and id(value) not in seen:
            seen.add(id(value))
            for each in value.values() if isinstance(value, dict) else value:
                if type(each) not in _CONSTANT:
                    self._note(each, seen)

    def replay(self) -> None:
        """Random state and attributes as they were; the buffers of a pass are copies anyway."""
        self._random_state.restore()
        for held, before in self._attributes:
            if held.keys() != before.keys():
                for name in held.keys() - before.keys() - _OF_EVERY_MODULE:
                    del held[name]
            held.update(before)
        for value in self._empty:
            if value:
                value.clear()
        for value, contents in self._contents:
            _put_back(value, contents)

    def restore(self) -> None:
        """All of it as it was.

        Buffers through ``data``, for a graph that holds one would take any change for one that
        spoils it, even the change back.
        """
        self.replay()
        for members, key, buffer, _ in self._places:
            members[key] = buffer
        values = {id(buffer): (buffer, value) for _, _, buffer, value in self._places}.values()
        copy_all([buffer.data for buffer, _ in values], [value for _, value in values])


def clones(tensors: Mapping[T, Tensor]) -> dict[T, Tensor]:
    """Copies of all of them."""
    is_simple = {name: is_plain(t) and not t.requires_grad for name, t in tensors.items()}
    copies = {n: torch.empty_like(t) if is_simple[n] else t.clone() for n, t in tensors.items()}
    names = [name for name, simple in is_simple.items() if simple]
    copy_all([copies[n] for n in names], [tensors[n] for n in names])
    return copies


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each to its target, by one operation as far as they are plain and alike."""
    plain = defaultdict[Any, list[tuple[Tensor, Tensor]]](list)
    for target, source in zip(targets, sources, strict=True):
        if is_plain(target) and is_plain(source):
            plain[target.device, target.dtype].append((target, source))
        else:
            target.copy_(source)
    for alike in plain.values():
        torch._foreach_copy_([target for target, _ in alike], [source for _, source in alike])


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_CONSTANT = {bool, int, float, str, type(None)}
_CONTAINERS = (list, dict, set, deque)
_OFTEN_EMPTY = {*_CONTAINERS, OrderedDict}
_MANY = 1000  # elements, of what is not opened: a vocabulary or a history


def _contents(value: Any) -> Any:
    """What an attribute holds that may change in place; None if that is not known to."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, _CONTAINERS):
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
