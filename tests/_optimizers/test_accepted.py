"""Which optimizers there are, what they hold, and which are refused."""

import pytest
import torch
import torchopt
from torch import nn
from torch.optim import SGD, Adam, AdamW

from cases import make_model
from reweight._optimizers.accepted import (
    as_optimizers,
    held_by,
    held_parameters,
    is_cold,
    log_what_stays,
)


def test_a_parameter_held_twice_is_refused() -> None:
    parameter = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="each parameter once"):
        as_optimizers([SGD([parameter], lr=0.1), SGD([parameter], lr=0.2)], [])


def test_optimizers_come_as_a_tuple_that_holds_the_model() -> None:
    model = make_model("mlp")
    parameters = list(model.parameters())
    optimizer = SGD(parameters, lr=0.1)
    assert as_optimizers(optimizer, parameters) == (optimizer,)
    halves = [SGD(parameters[:2], lr=0.1), AdamW(parameters[2:], lr=0.1)]
    assert as_optimizers(halves, parameters) == tuple(halves)
    (made,) = as_optimizers(torchopt.sgd(lr=0.1), parameters)
    assert list(map(id, held_by([made]))) == list(map(id, parameters))
    with pytest.raises(ValueError, match="holds none of them"):
        as_optimizers(SGD([torch.ones(2, requires_grad=True)], lr=0.1), parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match=r"got StepLR\. Pass its `optimizer`"):
        as_optimizers(scheduler, parameters)


def test_what_is_held_trainable_and_chosen_is_moved() -> None:
    model = make_model("mlp")
    model.blocks[0].requires_grad_(False)
    optimizers = [SGD([*model.blocks.parameters(), *model.exits[0].parameters()], lr=0.1)]
    held = held_parameters(model, optimizers)
    assert set(held) == {
        *(f"blocks.{i}.0.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"exits.0.{kind}" for kind in ("weight", "bias")),
    }
    assert all(held[name] is dict(model.named_parameters())[name] for name in held)
    chosen = held_parameters(model, optimizers, lambda name: "exits" in name)
    assert set(chosen) == {"exits.0.weight", "exits.0.bias"}
    model.exits[0].weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.complex64))
    with pytest.raises(ValueError, match="real parameters, got complex ones"):
        held_parameters(model, [SGD(model.parameters(), lr=0.1)])


def test_adam_is_cold_until_its_first_step() -> None:
    parameter = torch.ones(2, requires_grad=True)
    adam, sgd = Adam([parameter]), SGD([parameter], lr=0.1)
    assert is_cold(adam)
    assert not is_cold(sgd)
    parameter.grad = torch.ones(2)
    adam.step()
    assert not is_cold(adam)


def test_hooks_of_the_step_are_said_to_be_left_out(caplog) -> None:
    model = nn.Linear(2, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    log_what_stays(model, (optimizer,))
    assert not caplog.records
    optimizer.register_step_post_hook(lambda *_: None)
    log_what_stays(model, (optimizer,))
    assert "hooks of its step, which the look-ahead leaves out" in caplog.text
