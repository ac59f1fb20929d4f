"""The pseudo update against the step that the real optimizer takes next."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from cases import UPDATE_RULES, conventional_loss, make_batch, make_model, warm_up
from references import copy_together
from reweight.updates import check_optimizer, pseudo_update, step_where


def gradients_of(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = conventional_loss(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def assert_is_the_next_step(model: nn.Module, optimizer, gradients) -> None:
    parameters = dict(model.named_parameters())
    state_before = copy.deepcopy(optimizer.state_dict())
    leaves = {name: gradient.requires_grad_() for name, gradient in gradients.items()}
    predicted = pseudo_update(optimizer, parameters, leaves).parameters
    assert_same_state(optimizer.state_dict(), state_before)
    real_model, real_optimizer = copy_together(model, optimizer)
    for name, parameter in real_model.named_parameters():
        parameter.grad = gradients[name].detach() if name in gradients else None
    real_optimizer.step()
    for name, parameter in real_model.named_parameters():
        assert (predicted[name] - parameter).abs().max() < 1e-12, name
        assert predicted[name].requires_grad == (name in gradients)


def assert_same_state(a, b) -> None:
    leaves_a, leaves_b = (torch.utils._pytree.tree_leaves(tree) for tree in (a, b))
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("num_warm_steps", [0, 1, 4])
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_update_is_the_optimizers_next_step(rule: str, num_warm_steps: int) -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = UPDATE_RULES[rule](model)
    warm_up(model, optimizer, batch, num_warm_steps)
    assert_is_the_next_step(model, optimizer, gradients_of(model, batch))


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_parameter_that_first_gets_a_gradient_now(rule: str) -> None:
    """Fresh and warm parameters in one group: each as the real optimizer treats it."""
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = UPDATE_RULES[rule](model)
    model.blocks[0].requires_grad_(False)
    warm_up(model, optimizer, batch)
    model.blocks[0].requires_grad_(True)
    assert_is_the_next_step(model, optimizer, gradients_of(model, batch))


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_parameter_without_gradient_stays(rule: str) -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = UPDATE_RULES[rule](model)
    warm_up(model, optimizer, batch)
    gradients = gradients_of(model, batch)
    del gradients["blocks.0.0.weight"]
    assert_is_the_next_step(model, optimizer, gradients)


def test_scheduled_learning_rate_is_read_live() -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    warm_up(model, optimizer, batch)
    scheduler.step()
    assert_is_the_next_step(model, optimizer, gradients_of(model, batch))


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_zero_gradient_and_moment_have_derivative_zero_and_are_counted(optimizer_class) -> None:
    parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_class([parameter], lr=0.1, weight_decay=0.0)
    for gradient in ([1.0, 0.0, 0.5], [0.3, 0.0, 0.2]):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    gradient = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    update = pseudo_update(optimizer, {"p": parameter}, {"p": gradient})
    (derivative,) = torch.autograd.grad(update.parameters["p"].sum(), gradient)
    assert update.num_zero_moments == 1
    assert derivative[1] == 0
    assert derivative.isfinite().all()
    assert derivative[0] != 0
    assert derivative[2] != 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: RMSprop(p), TypeError, "one of SGD, Adam, AdamW"),
        (lambda p: type("Mine", (SGD,), {})(p, lr=0.1), TypeError, "got Mine"),
        (lambda p: Adam(p, amsgrad=True), ValueError, "amsgrad"),
    ],
)
def test_unknown_optimizers_are_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        check_optimizer(make([torch.zeros(1, requires_grad=True)]))


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("make", [Adam, SGD, lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_step_where_steps_or_changes_nothing(make, num_steps: int) -> None:
    def fresh():
        parameter = torch.tensor([1.0, 2.0], requires_grad=True)
        optimizer = make([parameter])
        for _ in range(num_steps):
            parameter.grad = torch.tensor([0.5, -1.0])
            optimizer.step()
        return parameter, optimizer

    (stepped, optimizer), (expected, plain) = fresh(), fresh()
    stepped.grad, expected.grad = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2])
    step_where(optimizer, torch.tensor(True))
    plain.step()
    assert torch.equal(stepped, expected)
    assert_same_state(optimizer.state_dict(), plain.state_dict())

    kept, optimizer = fresh()
    before = kept.detach().clone()
    state_before = copy.deepcopy(optimizer.state_dict())
    kept.grad = torch.tensor([torch.nan, 0.2])
    step_where(optimizer, torch.tensor(False))
    assert torch.equal(kept, before)
    assert kept.grad is None
    if num_steps:
        assert_same_state(optimizer.state_dict(), state_before)
