"""What is kept of a model is what a new look finds, and is noticed to be old after any change."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from reweight import _structure
from reweight._structure import structure_of


class Net(nn.Module):
    """Modules and tensors by two names, a buffer and a bias that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layers[0].weight
        self.parent = [self]  # which must not keep it alive for ever


def assert_found(model: nn.Module) -> None:
    """By PyTorch's own words."""
    found = structure_of(model)
    assert found.modules == list(model.modules())
    for mine, known in (
        (found.parameters, dict(model.named_parameters())),
        (found.buffers, dict(model.named_buffers())),
    ):
        assert list(mine) == list(known)
        assert all(mine[name] is known[name] for name in known)
    every = dict(model.named_parameters(remove_duplicate=False))
    every |= dict(model.named_buffers(remove_duplicate=False))
    for members, key, path, name in found.places:
        assert members[key] is every[path] is (found.parameters | found.buffers)[name]
    held = {
        (id(members), key)
        for module in found.modules
        for members in (module._parameters, module._buffers)
        for key, tensor in members.items()
        if tensor is not None
    }
    assert len(found.places) == len(held)
    assert {(id(members), key) for members, key, _, _ in found.places} == held


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that a model is gone through anew."""
    found: list[object] = []

    class Counted(_structure._Kept):
        def __init__(self, model: nn.Module) -> None:
            found.append(type(model))
            super().__init__(model)

    monkeypatch.setattr(_structure, "_Kept", Counted)
    return found


def test_it_is_asked_for_once(looks: list[object]) -> None:
    model = Net()
    for _ in range(3):
        assert_found(model)
    model.requires_grad_(False)  # changes what the parameters are, not which
    assert_found(model)
    assert len(looks) == 1


def replaced_by_nothing(model: Net) -> None:
    model.layers[0].bias = None


def swapped(model: Net) -> None:
    parts = model.tied._parameters
    parts["bias"], model.layers[0]._parameters["bias"] = model.layers[0].bias, parts["bias"]


def renamed(model: Net) -> None:
    model.head = model.tied
    del model.tied


CHANGES: dict[str, Callable[[Net], object]] = {
    "a new module": lambda model: model.layers.append(nn.Linear(3, 3)),
    "a module less": lambda model: model.layers.pop(1),
    "another module": lambda model: setattr(model.layers, "1", nn.Linear(3, 3)),
    "another name": renamed,
    "a parametrization": lambda model: parametrizations.weight_norm(model.layers[0]),
    "another parameter": lambda model: setattr(model.tied, "bias", nn.Parameter(torch.ones(3))),
    "a parameter that is gone": replaced_by_nothing,
    "parameters that change places": swapped,
    "a new parameter": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "untied": lambda model: setattr(model.tied, "weight", nn.Parameter(torch.ones(3, 3))),
    "a new buffer": lambda model: model.register_buffer("count", torch.zeros(())),
    "another buffer": lambda model: setattr(model.norm, "running_mean", torch.ones(3)),
    "a buffer where there was none": lambda model: setattr(model.norm, "running_mean", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, looks: list[object]) -> None:
    model = Net()
    assert_found(model)
    CHANGES[change](model)
    gc.collect()
    assert_found(model)
    assert len(looks) == 2
    assert_found(model)
    assert len(looks) == 2


def test_a_lazy_module_is_found_with_what_its_first_forward_makes() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.ReLU())
    assert_found(model)
    model(torch.ones(1, 4))
    assert_found(model)


def test_nothing_is_kept_alive() -> None:
    model = Net()
    kept = [weakref.ref(each) for each in (model, model.tied, model.layers[0])]
    structure_of(model)
    del model
    gc.collect()
    assert all(reference() is None for reference in kept)
