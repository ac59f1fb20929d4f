"""Tensors in the place of a model's own."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from reweight._structure import structure_of

T = TypeVar("T")


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], run: Callable[[], T]) -> T:
    """Runs it with these tensors in every place of the model's own of those names."""
    places = [place for place in structure_of(model).places if place.name in tensors]
    own = [members[key] for members, key, _, _ in places]
    try:
        for members, key, _, name in places:
            members[key] = tensors[name]
        return run()
    finally:
        for (members, key, _, _), tensor in zip(places, own, strict=True):
            members[key] = tensor
