"""Custom autograd Functions are seen in a pass, whenever they were bound, and in no other place."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd.function import _SingleLevelFunction

from cases import Double
from reweight._passes.custom_functions import applied_by
from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import PrimalCache

load_forward_mode()


double = Double.apply  # bound before, as many modules do


def test_calls_with_dual_numbers_are_handed_over() -> None:
    seen = []

    def handler(function, apply, args):
        seen.append((function, args[1:]))
        return apply(forward_ad.unpack_dual(args[0]).primal, *args[1:])

    with forward_ad.dual_level(), applied_by(handler):
        x = torch.ones(2)
        assert torch.equal(double(x), 2 * x)
        assert not seen
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(double(dual), 2 * x)
        assert torch.equal(Double.apply(dual, 3), 3 * x)
    assert seen == [(Double, ()), (Double, (3,))]


def test_other_threads_and_what_comes_after_are_left_alone() -> None:
    found = []

    def call() -> None:
        with forward_ad.dual_level():
            try:
                double(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
            except Exception as error:
                found.append(error)

    with applied_by(lambda *call: None):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(found) == 1, "PyTorch's own: the function has no jvp"
    assert "apply" not in vars(_SingleLevelFunction)
    with pytest.raises(ValueError, match="broken"), applied_by(lambda *call: None):
        raise ValueError("broken")
    assert "apply" not in vars(_SingleLevelFunction)


class InPlace(Double):
    @staticmethod
    def forward(ctx, x, y):
        ctx.mark_dirty(x)
        return x.mul_(2).add_(y)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient, gradient


class Viewed(Double):
    @staticmethod
    def forward(ctx, x):
        return x.view(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(2)


class Itself(Viewed):
    @staticmethod
    def forward(ctx, x):
        return x


class Several(torch.autograd.Function):
    """With a context of its own, an output without derivative, and one that is no number."""

    @staticmethod
    def forward(x, factor=2):
        return factor * x, x.round(), 3 * x, "name"

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.factor = inputs[1]
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx, gradient, _, other, __):
        return ctx.factor * gradient + 3 * other, None


class Random(Double):
    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.rand(2)
        return ctx.factor * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient


def in_place(x):
    y = x * 1
    InPlace.apply(y, x)
    return y


def without_gradient(function, *args):
    with torch.no_grad():
        return function(*args)


CALLS = {
    "in place": (lambda x: InPlace.apply(x * 1, x), lambda x: 3 * x),
    "in place, its argument": (in_place, lambda x: 3 * x),
    "a view": (Viewed.apply, lambda x: x.view(1, 2)),
    "its argument": (Itself.apply, lambda x: x),
    "several outputs": (lambda x: Several.apply(x)[0] * Several.apply(x)[2], lambda x: 6 * x * x),
    "by name": (lambda x: Several.apply(x, factor=5)[0], lambda x: 5 * x),
    "without derivative": (lambda x: x + Several.apply(x)[1], lambda x: x + x.detach().round()),
    "random": (
        lambda x: Random.apply(x) * torch.rand(2),
        lambda x: torch.rand(2) * x * torch.rand(2),
    ),
    "a view, without gradient": (
        lambda x: x.view(1, 2) * without_gradient(Viewed.apply, x),
        lambda x: x.view(1, 2) * x.detach().view(1, 2),
    ),
    "several, without gradient": (
        lambda x: x * without_gradient(Several.apply, x)[0],
        lambda x: x * 2 * x.detach(),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_and_tangents_are_those_of_plain_operations(name: str) -> None:
    x, dx = torch.rand(2, 2, dtype=torch.float64) + 0.2
    function, plain = CALLS[name]
    found, ladder = [], Ladder()
    for call in (function, plain):

        def forward(call=call):
            torch.manual_seed(0)
            with forward_ad.dual_level(), tangents_follow_gradients(PrimalCache(), ladder):
                return forward_ad.unpack_dual(call(forward_ad.make_dual(x.clone(), dx.clone())))

        found.append(ladder.run(forward))
    (y, dy), (expected, slope) = found
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dy, slope)
