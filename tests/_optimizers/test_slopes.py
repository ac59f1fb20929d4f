"""What is done to two entries is done to others, with the slope that autograd gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reweight._optimizers.recorder import Recorder
from reweight._optimizers.slopes import OfEach, Program, Slope

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of x, which moves, and y
    "add": lambda x, y: y.add(x, alpha=-0.1) + x,
    "sub": lambda x, y: y.sub(x, alpha=0.1) - x,
    "mul": lambda x, y: x * y * x * 3,
    "div": lambda x, y: x / y + y / (x * x + 1) / 2,
    "sqrt": lambda x, y: (x * x + 1).sqrt(),
    "addcmul": lambda x, y: torch.addcmul(x, x, x * y, value=-2),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, x * x + y, value=-2),
    "lerp": lambda x, y: x.lerp(y, 0.1) + y.lerp(x, 0.2) + x.lerp(y, 0.1 * x),
    "maximum": lambda x, y: torch.maximum(x, y) + torch.maximum(x * 2, x * y) + y.maximum(x),
    "copy": lambda x, y: y.copy_(x * 3) * x,
    "in place": lambda x, y: y.mul_(0.9).addcmul_(x, x, value=0.1).sqrt_() + 1e-8,
    "foreach": lambda x, y: torch._foreach_addcdiv([x], [y], [(x * x).add_(y)], [-0.3])[0],
    "no rule": lambda x, y: (x * y).exp() + torch.where(x > y, x.abs(), x.neg()) - x.clamp(max=0.1),
    "a rounding mode": lambda x, y: x * torch.div(x * 9, y, rounding_mode="floor"),
    "a number as tensor": lambda x, y: x * torch.tensor(0.3) + y * torch.tensor(0.2).add_(1),
    "does not move": lambda x, y: y * 2 + 1,
    "moves no more": lambda x, y: x.zero_() + y,
}


def recorded(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Program:
    recorder, place, x, y = Recorder(), x.clone(), x.clone(), y.clone()
    recorder.calls = []
    recorder.write(place, x.requires_grad_())
    with torch.no_grad(), recorder.numbers(), recorder:
        result = function(place, y)
    assert recorder.is_entrywise
    return Program(recorder.calls, [x, y], recorder.read(result))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_slopes_are_those_of_autograd(name: str, dtype: torch.dtype) -> None:
    function, generator = OPERATIONS[name], torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 70, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
    value, slope = recorded(function, x[:2], y[:2])([x, y])
    leaf = x.clone().requires_grad_()
    expected = function(leaf.clone(), y.clone())
    derivative = torch.zeros_like(x)
    if expected.requires_grad:
        (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    assert torch.equal(value, expected)
    found = slope.scale * (torch.ones_like(x) if slope.entries is None else slope.entries)
    # Both are sums of a few products, that may cancel, in another order.
    off = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, derivative, rtol=off, atol=off)


def test_what_all_entries_have_in_common_stays_a_number() -> None:
    x, y = torch.rand(2, 2)
    program = recorded(lambda x, y: y.mul_(0.5).add_(x, alpha=-0.25).div_(0.5), x, y)
    assert program([torch.rand(9), torch.rand(9)])[1] == Slope(-0.5)


def test_what_is_only_written_to_plays_no_part() -> None:
    x, y = torch.rand(2, 2)
    program = recorded(lambda x, y: torch.maximum(x * y, y, out=x.mul_(3)), x, y)
    value, slope = program([torch.tensor([0.5, 2.0]), torch.tensor([0.1, 0.2])])
    torch.testing.assert_close(value, torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(slope.scale * slope.entries, torch.tensor([0.0, 0.2]))


def test_a_root_at_0_has_no_slope() -> None:
    """It is not finite, to be found and counted."""
    x, y = torch.rand(2, 2)
    program = recorded(lambda x, y: x / (y.addcmul_(x, x).sqrt_() + 1e-8), x, y)
    assert program([torch.zeros(3), torch.zeros(3)])[1].entries.isnan().all()


@pytest.mark.parametrize("others", [torch.arange(2.0), torch.ones(3, 1)])
def test_entries_that_meet_others_have_no_program(others: Tensor) -> None:
    x, y = torch.rand(2, 2)
    with pytest.raises(ValueError, match="changed their shape, or met others"):
        recorded(lambda x, y: x * y + others, x, y)


def with_numbers(function: Callable[..., Tensor]) -> Program:
    """Of x and a number t, recorded."""
    recorder, x, t = Recorder(), torch.rand(2), torch.tensor(3.0)
    recorder.calls = []
    place, count = x.clone(), t.clone()
    recorder.write(place, x.requires_grad_())
    recorder.write(count, t)
    with torch.no_grad(), recorder.numbers(), recorder:
        result = function(place, count)
    assert recorder.is_entrywise
    return Program(recorder.calls, [x], recorder.read(result), {"t": t})


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_each_parameter_has_its_own_numbers(shape: tuple[int, ...]) -> None:
    program = with_numbers(lambda x, t: x * (1 - 0.5 ** t.add_(1)) + torch.where(t > 3, x, x / t))
    parameters, t = [torch.rand(4, *shape[1:]), torch.rand(2, *shape[1:])], torch.tensor([1.0, 7.0])
    x = torch.cat(parameters)
    each = torch.tensor([2.0] * 4 + [8.0] * 2).view(shape)
    slope = 1 - 0.5**each + torch.where(each > 3, 1, 1 / each)
    value, found = program([x], OfEach({"t": t}, parameters, len(shape)))
    torch.testing.assert_close(value, x * slope)
    torch.testing.assert_close(found.scale * found.entries, slope)
    alone, _ = program([x[:4]], OfEach({"t": t[0]}, parameters[:1], len(shape)))
    torch.testing.assert_close(alone, value[:4])


def test_numbers_are_spread_as_they_are_broadcast() -> None:
    parameters = [torch.rand(3), torch.rand(0), torch.rand(1)]
    numbers = torch.tensor([1.0, 2.0, 3.0])
    spread = OfEach({}, parameters, 1).spread(numbers, torch.float32)
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 1.0, 3.0]).float())
    assert OfEach({}, parameters[:1], 3).spread(numbers[0], torch.float64).shape == (1, 1, 1)
    assert OfEach({}, [torch.rand(())], 0).spread(numbers[0], torch.float64).shape == ()
    assert OfEach({}, parameters, 1).spread(numbers > 1, torch.float32).dtype is torch.bool


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: x * t.item(),
        lambda x, t: x * float(t + 1),
        lambda x, t: x * 2 if t > 2 else x,
        lambda x, t: x + torch.zeros_like(x).fill_(t),
        lambda x, t: x * t.sum(),
    ],
)
def test_numbers_that_become_constants_have_no_program(function) -> None:
    with pytest.raises(ValueError, match="numbers became constants"):
        with_numbers(function)
