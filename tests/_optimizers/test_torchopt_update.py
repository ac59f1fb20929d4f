"""The look-ahead of a torchopt optimizer is its next step, and leaves it as it was."""

import pytest
import torch

from cases import TORCHOPT, conventional_loss, gradients_of, make_batch, make_model
from reweight._optimizers.pseudo_update import pseudo_update


@pytest.mark.parametrize("num_warm_steps", [0, 1, 3])
@pytest.mark.parametrize("rule", TORCHOPT)
def test_an_optimizer_of_torchopt_is_taken_as_it_is(rule: str, num_warm_steps: int) -> None:
    """Looking ahead twice changes nothing: not even what torchopt keeps outside the state."""
    model, batch = make_model("mlp"), make_batch("mlp")
    parameters = dict(model.named_parameters())
    optimizer = TORCHOPT[rule](tuple(parameters.values()))
    for _ in range(num_warm_steps):
        optimizer.zero_grad(set_to_none=True)
        conventional_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    gradients = {name: g.requires_grad_() for name, g in gradients_of(model, batch).items()}
    first, second = (pseudo_update([optimizer], parameters, gradients) for _ in range(2))
    for name, parameter in parameters.items():
        assert torch.equal(first.parameters[name], second.parameters[name])
        parameter.grad = gradients[name].detach().clone()
    optimizer.step()
    for name, parameter in parameters.items():
        assert (first.parameters[name] - parameter).abs().max() < 1e-12, name
        assert first.parameters[name].requires_grad


def test_a_parameter_that_torchopt_has_no_momentum_for_stays() -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    parameters = dict(model.named_parameters())
    optimizer = TORCHOPT["sgd_dampening"](tuple(parameters.values()))
    model.blocks[0].requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        conventional_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    model.blocks[0].requires_grad_(True)
    gradients = gradients_of(model, batch)
    predicted = pseudo_update([optimizer], parameters, gradients).parameters
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    for name, parameter in parameters.items():
        assert (predicted[name] - parameter).abs().max() < 1e-12, name
