"""One call at a time: its tangents by either way, and all that a call leaves behind, once."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional as F

from reweight._passes.forward_mode import load_forward_mode
from reweight._passes.operations import NoDerivativeError, by_backward, by_differences, unpack

load_forward_mode()

WAYS = {
    "backward": by_backward,
    "float64": lambda *call: by_differences(*call, double=True),
    "own precision": lambda *call: by_differences(*call, double=False),
}
# Of rounding; of a central difference; of one with about 2e-7 of rounding to the power of ⅔.
TOLERANCES = {"backward": 1e-12, "float64": 1e-8, "own precision": 1e-8}


@pytest.fixture(autouse=True)
def level():
    torch.manual_seed(0)
    with forward_ad.dual_level():
        yield


def moving(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return forward_ad.make_dual(
        torch.rand(shape, dtype=dtype) + 0.5, torch.randn(shape, dtype=dtype)
    )


def twin(tensor: Tensor) -> Tensor:
    value, tangent = unpack(tensor)
    return (
        value.clone() if tangent is None else forward_ad.make_dual(value.clone(), tangent.clone())
    )


def nested(
    tensors: dict[str, list[Tensor]], factor: float, *, power: Tensor
) -> tuple[dict, Tensor]:
    first, second = tensors["pair"]
    return {"product": first * second * factor, "places": first.argmax(1)}, first.pow(power)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(y).add_(y.sin())


def into_a_part(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0].mul_(y[:, 1])
    return x[:, 1] * y[:, 0]


def with_noise(x: Tensor, y: Tensor) -> Tensor:
    return F.dropout(x, 0.5) * y + torch.rand_like(y)


CALLS = {
    "same tensor twice": (lambda x, y: x * x * y, {}),
    "several outputs": (lambda x, y: (x * y, x.detach() * 2, (y + x).round().long()), {}),
    "in place": (in_place, {}),
    "in place of a view": (into_a_part, {}),
    "random": (with_noise, {}),
    "by name": (lambda x, other: x / other, {"other": None}),
    "complex": (lambda x, y: torch.fft.rfft(x) * torch.complex(x, y).sum(), {}),
    "a constant": (lambda x, y: torch.ones_like(x), {}),
}


def leaves_of(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_as_in_forward_mode(name: str, way: str) -> None:
    func, named = CALLS[name]
    ends = []
    for run in (lambda func, args, kwargs: func(*args, **kwargs), WAYS[way]):
        torch.manual_seed(1)
        x, y = moving(3, 4), moving(3, 4)
        args, kwargs = ((x,), {"other": y}) if named else ((x, y), {})
        result = run(func, args, kwargs)
        ends.append([*leaves_of(result), x, y, torch.get_rng_state()])
    for expected, found in zip(*ends, strict=True):
        (one, tangent), (other, derived) = unpack(expected), unpack(found)
        assert torch.equal(one, other), "values are those of one call"
        assert not found.requires_grad
        if tangent is None:
            assert derived is None
        else:
            tolerance = TOLERANCES[way]
            torch.testing.assert_close(derived, tangent, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_containers_and_numbers(way: str) -> None:
    x, y, power = moving(3, 4), moving(3, 4), torch.tensor(2.0, dtype=torch.float64)
    args, kwargs = ({"pair": [x, y]}, 3.0), {"power": power}
    expected, found = nested(*args, **kwargs), WAYS[way](nested, args, kwargs)
    assert torch.equal(found[0]["places"], expected[0]["places"])
    for one, other in ((found[0]["product"], expected[0]["product"]), (found[1], expected[1])):
        torch.testing.assert_close(unpack(one)[1], unpack(other)[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_in_place_is_the_callers_own(way: str) -> None:
    x, y = moving(3, 4), moving(3, 4)
    assert WAYS[way](in_place, (x, y), {}) is x


@pytest.mark.parametrize("way", WAYS)
def test_buffers_move_once(way: str) -> None:
    x, mean, count = (
        moving(5, 3),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
    )

    def counting(x: Tensor, mean: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        mean.mul_(0.9).add_(x.detach().mean(0))
        return x - x.mean(0)

    WAYS[way](counting, (x, mean, count), {})
    assert count == 1
    assert torch.equal(mean, unpack(x)[0].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_in_float64_give_every_digit_of_a_lower_precision(dtype: torch.dtype) -> None:
    x, y = moving(6, 4, dtype=dtype), moving(6, 4, dtype=dtype)
    value, tangent = unpack(by_differences(torch.atan2, (x, y), {}, double=True))
    assert value.dtype == tangent.dtype == dtype
    assert torch.equal(value, torch.atan2(unpack(x)[0], unpack(y)[0]))
    exact = torch.atan2(x.double(), y.double())
    torch.testing.assert_close(tangent, unpack(exact)[1].to(dtype))  # one rounding


def test_an_operation_that_knows_no_float64_says_so() -> None:
    x = moving(3, 4, dtype=torch.float32)
    for func in (
        lambda x: x.float().sin(),
        lambda x: x.sin() if x.dtype == torch.float32 else None.sin(),
    ):
        with pytest.raises(NoDerivativeError):
            by_differences(func, (x,), {}, double=True)
    near = unpack(by_differences(torch.sin, (x,), {}, double=False))[1]
    exact = unpack(x.sin())[1]
    assert (
        near - exact
    ).norm() < 1e-3 * exact.norm()  # the cubic root of 1e-7, squared, and a margin


class Cut(torch.autograd.Function):
    """Of one input the backward has a graph, of the other it has none."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y, (gradient * x).detach()


class Once(Cut):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x


def test_a_backward_without_derivative_is_noticed() -> None:
    def means(x: Tensor, y: Tensor) -> Tensor:
        return torch.segment_reduce(x * y, "mean", lengths=torch.tensor([1, 2]), axis=0)

    for func in (Cut.apply, Once.apply, means):
        with pytest.raises(NoDerivativeError):
            by_backward(func, (moving(3, 4), moving(3, 4)), {})


def test_a_backward_of_zeros_is_none_of_these() -> None:
    tangent = unpack(by_backward(torch.round, (moving(3, 4),), {}))[1]
    assert tangent is not None
    assert not tangent.any()


def test_the_error_of_a_call_that_fails_is_its_own() -> None:
    for way in WAYS.values():
        with pytest.raises((ValueError, NoDerivativeError), match="nothing doing"):
            way(failing, (moving(3, 4),), {})


def failing(x: Tensor) -> Tensor:
    raise ValueError("nothing doing")


def test_a_graph_that_was_there_stays() -> None:
    leaf = torch.rand(3, dtype=torch.float64, requires_grad=True)
    x = forward_ad.make_dual(leaf * 2, torch.ones(3, dtype=torch.float64))
    y = by_backward(torch.exp, (x,), {})
    (gradient,) = torch.autograd.grad(unpack(y)[0].sum(), leaf)
    torch.testing.assert_close(gradient, 2 * (2 * leaf).exp().detach())
