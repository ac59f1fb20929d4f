"""Operations go down the ladder one by one, are remembered, and nothing is done twice."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.ladder import Ladder, NoTangentError, Rung
from reweight._passes.primal_cache import PrimalCache

load_forward_mode()


def run(
    func: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor, ladder: Ladder
) -> tuple[Tensor, Any]:
    def forward() -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        with forward_ad.dual_level(), tangents_follow_gradients(PrimalCache(), ladder):
            value = x.clone().requires_grad_(ladder.needs_graph)
            y, dy = forward_ad.unpack_dual(func(forward_ad.make_dual(value, dx)))
            return y.detach(), None if dy is None else dy.detach()

    return ladder.run(forward)


def slope(func: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor) -> Tensor:
    ends = []
    for sign in (1, -1):
        torch.manual_seed(0)
        ends.append(func((x + sign * 1e-6 * dx).requires_grad_()).detach())
    return (ends[0] - ends[1]) / 2e-6


def convolved(x: Tensor) -> Tensor:
    return torch.conv_tbc(x.view(4, 2, 2), x[:8].view(2, 2, 2).tanh(), x[:2])


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.noise = torch.rand_like(x)
        return x * ctx.noise

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.noise


class Keeps(torch.autograd.Function):
    """What checkpointing of older versions keeps its inputs by: there is nothing to come back."""

    @staticmethod
    def forward(ctx, x):
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("there is no gradient of nothing")


def test_what_has_no_entries_needs_no_backward() -> None:
    ladder, x = Ladder(), torch.randn(3, dtype=torch.float64)
    _, tangent = run(lambda x: torch.cat([x.sin(), Keeps.apply(x)]), x, torch.ones_like(x), ladder)
    torch.testing.assert_close(tangent, x.cos())
    assert set(ladder.ways.values()) <= {Rung.BACKWARD}


def means(x: Tensor) -> Tensor:
    return torch.segment_reduce(x.view(8, 2), "mean", lengths=torch.tensor([3, 5]), axis=0)


class Local:
    """Makes its Function anew at every call."""

    def __call__(self, x: Tensor) -> Tensor:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, gradient):
                return 2 * ctx.saved_tensors[0] * gradient

        return Square.apply(x)


class WithRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("not asked for")

    @staticmethod
    def jvp(ctx, dx):
        return 2 * ctx.saved_tensors[0] * dx


class BrokenRule(Local):
    def __call__(self, x: Tensor) -> Tensor:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, gradient):
                return 2 * ctx.saved_tensors[0] * gradient

            @staticmethod
            def jvp(ctx, dx):
                raise KeyError("of whatever wording")

        return Square.apply(x)


CALLS = {
    "conv_tbc": (convolved, Rung.BACKWARD),
    "random": (lambda x: Noisy.apply(x) * torch.rand_like(x), Rung.DOUBLE_DIFFERENCES),
    "segment_reduce": (means, Rung.DOUBLE_DIFFERENCES),
    "a Function made anew": (Local(), Rung.BACKWARD),
    "a Function whose rule fails": (BrokenRule(), Rung.BACKWARD),
    "a Function with a rule": (WithRule.apply, None),
    "scatter_reduce_": (
        lambda x: (x * 1).scatter_reduce_(0, torch.arange(16) // 2, x.sin(), "prod"),
        Rung.BACKWARD,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_operations_without_forward_rule_are_exact(name: str, caplog) -> None:
    func, rung = CALLS[name]
    x, dx = torch.rand(2, 16, dtype=torch.float64) + 0.5
    ladder = Ladder()
    with caplog.at_level(logging.INFO, "reweight"):
        first, again = (run(func, x, dx, ladder) for _ in range(2))
    assert set(ladder.ways.values()) == ({rung} if rung else set())
    assert len(caplog.records) == (rung is not None), "told once"
    torch.testing.assert_close(first[1], slope(func, x, dx).view_as(first[1]), rtol=1e-6, atol=1e-8)
    torch.manual_seed(0)
    assert torch.equal(first[0], func(x))
    assert all(map(torch.equal, first, again))


def test_a_pass_begins_anew_for_each_operation_once() -> None:
    passes = []

    def func(x: Tensor) -> Tensor:
        passes.append(1)
        return convolved(x).sum() + means(x).sum()

    ladder = Ladder()
    run(func, *torch.rand(2, 16), ladder)
    assert len(passes) == 4  # conv_tbc, twice for segment_reduce, and then through
    run(func, *torch.rand(2, 16), ladder)
    assert len(passes) == 5


def test_the_model_does_not_catch_it_but_catches_its_own() -> None:
    def func(x: Tensor) -> Tensor:
        try:
            y = convolved(x)
        except Exception:
            y = x.sum()
        try:
            return y.sum() + torch.linalg.cholesky(-(x.view(4, 4))).sum()
        except torch.linalg.LinAlgError:
            return y.sum() + x.sum()

    x, dx = torch.rand(2, 16, dtype=torch.float64)
    found = run(func, x, dx, Ladder())[1]
    torch.testing.assert_close(found, slope(func, x, dx), rtol=1e-6, atol=1e-8)


def test_no_grad_cuts_custom_functions_too() -> None:
    def func(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = Local()(x)
        with torch.inference_mode():
            Local()(x)
        return scale * x

    x, dx = torch.rand(2, 16)
    assert torch.equal(run(func, x, dx, Ladder())[1], x * x * dx)


def test_a_gradient_through_what_has_no_rule_is_said_to_have_no_tangent() -> None:
    def func(x: Tensor, create_graph: bool) -> Tensor:
        (slope,) = torch.autograd.grad(Local()(x).sum(), x, create_graph=create_graph)
        return slope * x

    x, dx = torch.rand(2, 16)
    torch.testing.assert_close(
        run(lambda x: func(x, False), x, dx, Ladder())[1], 2 * x * dx, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(NoTangentError, match=r"takes a gradient through .*Square"):
        run(lambda x: func(x, True), x, dx, Ladder())


def test_gradients_and_hooks_get_a_graph_when_they_ask_for_one() -> None:
    def func(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda gradient: gradient)
        (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return y + slope

    x, dx = torch.rand(2, 16, dtype=torch.float64)
    ladder = Ladder()
    found = run(func, x, dx, ladder)[1]
    assert ladder.needs_graph
    torch.testing.assert_close(found, slope(func, x, dx), rtol=1e-6, atol=1e-8)


def test_the_end_of_the_ladder_names_the_operation() -> None:
    class Picky(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            Picky.calls += 1
            if not torch.equal(x, first):
                raise ValueError("only this one")
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient.detach()

    first, dx = torch.rand(2, 16)
    with pytest.raises(NoTangentError, match=r"no derivative of .*Picky: only this one"):
        run(Picky.apply, first, dx, Ladder())


def test_ordinary_operations_pay_nothing(monkeypatch) -> None:
    from reweight._passes import ladder as module

    def unexpected(*args: object) -> None:
        raise AssertionError("asked for tangents")

    monkeypatch.setattr(module, "have_tangents", unexpected)
    run(lambda x: (x @ x).sin() + x[:3].sum().view(()) * x.shape[0], *torch.rand(2, 16), Ladder())
