"""The pseudo update against the step that the real optimizer takes next."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

from cases import (
    OPTIMIZERS,
    TORCHOPT,
    UPDATE_RULES,
    gradients_of,
    make_batch,
    make_model,
    warm_up,
)
from properties import assert_same
from references import copy_together
from reweight._optimizers.accepted import check_differentiable
from reweight._optimizers.pseudo_update import clip_gradients, pseudo_update
from reweight._optimizers.recorded_step import recorded_step


def assert_is_the_next_step(model: nn.Module, optimizer, gradients) -> None:
    parameters = dict(model.named_parameters())
    state_before = copy.deepcopy(optimizer.state_dict())
    leaves = {name: gradient.requires_grad_() for name, gradient in gradients.items()}
    predicted = pseudo_update([optimizer], parameters, leaves).parameters
    assert_same(optimizer.state_dict(), state_before)
    real_model, real_optimizer = copy_together(model, optimizer)
    for name, parameter in real_model.named_parameters():
        parameter.grad = gradients[name].detach() if name in gradients else None
    real_optimizer.step()
    for name, parameter in real_model.named_parameters():
        assert (predicted[name] - parameter).abs().max() < 1e-12, name
        assert predicted[name].requires_grad == (name in gradients)


@pytest.mark.parametrize("num_warm_steps", [0, 1, 4, 7])  # RAdam rectifies from the sixth on
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


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_counts_are_exact_in_single_precision_too(rule: str) -> None:
    torch.set_default_dtype(torch.float32)
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = OPTIMIZERS[rule](model)
    warm_up(model, optimizer, batch)
    assert_is_the_next_step(model, optimizer, gradients_of(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_parameters_keep_their_dtype(rule: str, dtype: torch.dtype) -> None:
    """Scalars too, which promote where larger tensors do not."""
    model = nn.Module()
    model.matrix = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    model.scalar = nn.Parameter(torch.ones((), dtype=dtype))
    optimizer = UPDATE_RULES[rule](model)
    parameters = dict(model.named_parameters())
    gradients = {name: torch.full_like(p, 0.5) for name, p in parameters.items()}
    predicted = pseudo_update([optimizer], parameters, gradients).parameters
    assert {p.dtype for p in predicted.values()} == {dtype}


def test_scheduled_learning_rate_is_read_live() -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    warm_up(model, optimizer, batch)
    scheduler.step()
    assert_is_the_next_step(model, optimizer, gradients_of(model, batch))


@pytest.mark.parametrize("kind", [torch.optim.Adam, AdamW, torch.optim.Adamax, torch.optim.RAdam])
def test_betas_in_single_precision_are_rounded_as_the_class_does(kind) -> None:
    """To the last bit; that of a power would show in θ̂."""
    model, batch = make_model("mlp"), make_batch("mlp")
    betas = torch.tensor(0.9, dtype=torch.float32), torch.tensor(0.99, dtype=torch.float32)
    optimizer = kind(model.parameters(), lr=0.01, betas=betas)
    warm_up(model, optimizer, batch, 7)
    parameters = dict(model.named_parameters())
    leaves = {name: g.requires_grad_() for name, g in gradients_of(model, batch).items()}
    by_id = {id(p): leaves[name] for name, p in parameters.items()}
    predicted = pseudo_update([optimizer], parameters, leaves).parameters
    own = recorded_step(optimizer, by_id).parameters
    assert all(torch.equal(predicted[name], own[id(p)]) for name, p in parameters.items())
    found, expected = (
        torch.autograd.grad(sum(new.sum() for new in step.values()), list(leaves.values()))
        for step in (predicted, own)
    )
    for v, slope in zip(found, expected, strict=True):
        assert (v - slope).norm() <= 1e-13 * slope.norm()


def test_gradient_descent_knows_the_direction_but_not_torchopt() -> None:
    class Mine(SGD):
        pass

    parameter = torch.ones(2, requires_grad=True)
    optimizer = Mine([parameter], lr=0.1, maximize=True)
    update = pseudo_update([optimizer], {"p": parameter}, {"p": parameter}, "gradient_descent")
    torch.testing.assert_close(update.parameters["p"], torch.full((2,), 1.1))
    with pytest.raises(TypeError, match="Leave pseudo_update away"):
        check_differentiable(TORCHOPT["sgd"]((parameter,)), "gradient_descent")


def test_every_optimizer_of_pytorch_has_its_row_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    table = page[page.index("| optimizer | by |") :]
    names = [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    ]
    missing = [name for name in names if name != "Optimizer" and name not in table]
    assert not missing


def test_several_optimizers_move_each_its_own() -> None:
    model, batch = make_model("mlp"), make_batch("mlp")
    optimizers = [
        SGD(model.blocks.parameters(), lr=0.1, momentum=0.9),
        AdamW(model.exits.parameters(), lr=0.01),
    ]
    for optimizer in optimizers:
        warm_up(model, optimizer, batch)
    gradients, parameters = gradients_of(model, batch), dict(model.named_parameters())
    predicted = pseudo_update(optimizers, parameters, gradients).parameters
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in parameters.items():
        assert (predicted[name] - parameter).abs().max() < 1e-12, name


ZERO_MOMENTS = ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax"]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ZERO_MOMENTS] + [(n, {"amsgrad": True}) for n in ("Adam", "AdamW")],
)
def test_zero_gradient_and_moment_have_derivative_zero_and_are_counted(name, options) -> None:
    parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, weight_decay=0.0, **options)
    for gradient in [[1.0, 0.0, 0.5], [0.3, 0.0, 0.2]] * 3:  # RAdam divides from the sixth step on
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    gradient = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    update = pseudo_update([optimizer], {"p": parameter}, {"p": gradient})
    (derivative,) = torch.autograd.grad(update.parameters["p"].sum(), gradient)
    assert update.num_zero_moments == 1
    assert derivative[1] == 0
    assert derivative.isfinite().all()
    assert derivative[0] != 0
    assert derivative[2] != 0


def test_radam_with_foreach_has_a_derivative_in_its_first_steps() -> None:
    """Its own step divides by 0 then, so that what is recorded of it has none."""
    parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RAdam([parameter], lr=0.1, foreach=True)
    gradient = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    moved = pseudo_update([optimizer], {"p": parameter}, {"p": gradient}).parameters["p"]
    (derivative,) = torch.autograd.grad(moved.sum(), gradient)  # θ̂ = θ − 0.1 · g at first
    torch.testing.assert_close(derivative, torch.full_like(gradient, -0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (100, 100)])
@pytest.mark.parametrize("rule", ["adam", "adamw_tensor_lr", "sgd_tensor_lr", "rmsprop"])
def test_no_slope_in_any_shape_makes_nan(rule: str, shape: tuple[int, ...]) -> None:
    """Small parameters go through a rule together, large ones alone; here nothing has moved yet."""
    model = nn.Module()
    model.only = nn.Parameter(torch.zeros(shape))
    optimizer = UPDATE_RULES[rule](model)
    gradient = torch.zeros(shape, requires_grad=True)
    update = pseudo_update([optimizer], {"only": model.only}, {"only": gradient})
    (derivative,) = torch.autograd.grad(update.parameters["only"].sum(), gradient)
    assert derivative.isfinite().all()
    assert update.num_zero_moments == (0 if rule.startswith("sgd") else gradient.numel())


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_that_of_pytorch(max_norm: float) -> None:
    gradients = {"a": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    clipped = clip_gradients(gradients, max_norm)
    parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    for parameter, gradient in zip(parameters, clipped.values(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Rprop, "got Rprop: its step follows the signs of the gradient alone"),
        (torch.optim.LBFGS, "got LBFGS: its step evaluates the loss itself, by a closure"),
        (torch.optim.SparseAdam, "got SparseAdam: its step raises RuntimeError: SparseAdam does"),
    ],
)
def test_optimizers_without_derivative_are_refused_with_the_reason(make, message) -> None:
    parameter = torch.ones(2, 2, requires_grad=True)
    optimizer = make([parameter])
    gradients = {"p": torch.full((2, 2), 2.0)}

    def look_ahead() -> None:
        check_differentiable(optimizer)
        pseudo_update([optimizer], {"p": parameter}, gradients)

    with pytest.raises(TypeError, match=message) as refusal:
        look_ahead()
    assert "pseudo_update='gradient_descent'" in str(refusal.value)
    update = pseudo_update([optimizer], {"p": parameter}, gradients, "gradient_descent")
    lr = optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(update.parameters["p"], torch.full((2, 2), 1 - 2.0 * lr))


def test_the_twin_of_a_stock_class_calls_no_hook_of_the_user() -> None:
    model = make_model("mlp")
    optimizer = torch.optim.NAdam(model.parameters())
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        parameters = dict(model.named_parameters())
        gradients = {n: torch.ones_like(p).requires_grad_() for n, p in parameters.items()}
        pseudo_update([optimizer], parameters, gradients)
    finally:
        hook.remove()
    assert not calls
