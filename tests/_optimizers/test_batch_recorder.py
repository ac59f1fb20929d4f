"""What is done to one parameter is done to all of its batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reweight._optimizers.batch_recorder import BatchRecorder

MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of two of a member
    "in place": lambda x, y: x.mul_(0.9).addcmul_(y, y, value=0.1),
    "of fewer dimensions": lambda x, y: x.div_(y.norm()) * y.sum(0),
    "products": lambda x, y: torch.addmm(x @ x.T, x, y.T, beta=2, alpha=3),
    "a number": lambda x, y: torch.addcdiv(x, y, y * y + 1, value=y.norm().item()),
    "numbers of others": lambda x, y: x * min(2 * x.sum().item() ** 2, 1 / y.norm().item()),
    "lists": lambda x, y: torch._foreach_add([x, y], [y, x], alpha=0.3)[1],
    "lists with numbers": lambda x, y: torch._foreach_mul([x, y], [y.norm().item(), 2.0])[0],
    "another precision": lambda x, y: x * y.float().norm(),
    "views": lambda x, y: x.t()[1:].mul_(y[:, 1:].t()).sum(0) + x[0, 1],
    "out": lambda x, y: torch.maximum(x, y, out=torch.empty_like(x)),
    "made anew": lambda x, y: torch.zeros_like(x).add_(y).copy_(x) + torch.ones(3).double(),
    "copies": lambda x, y: torch.zeros(3, 3).double().copy_(torch.stack([x, y])[1]).t() * x,
    "where": lambda x, y: torch.where(x > y, x.exp(), y),
    "constants": lambda x, y: x * torch.tensor(3.0).add_(1).item() + torch.eye(3).double(),
}


def recorded(function: Callable[[Tensor, Tensor], Tensor], xs: Tensor, ys: Tensor) -> Tensor:
    recorder, x, y = BatchRecorder(None), torch.empty_like(xs[0]), torch.empty_like(ys[0])
    recorder.hold(x, list(xs), 0)
    recorder.hold(y, list(ys), 0)
    with torch.no_grad(), recorder.numbers(), recorder:
        result = function(x, y)
    return recorder.read(result)


@pytest.mark.parametrize("num_members", [1, 4])
@pytest.mark.parametrize("name", MOVES)
def test_members_come_to_what_each_does_alone(name: str, num_members: int) -> None:
    function = MOVES[name]
    xs, ys = torch.rand(2, num_members, 3, 3) + 0.1
    results, slopes = [], []
    for in_batch in (True, False):
        x, y = xs.clone().requires_grad_(), ys.clone().requires_grad_()
        if in_batch:
            moved = recorded(function, x, y)
        else:
            ones = (recorded(function, x[i : i + 1], y[i : i + 1]) for i in range(num_members))
            moved = torch.cat(list(ones))
            with torch.no_grad():
                alone = torch.stack([function(a, b) for a, b in zip(xs.clone(), ys, strict=True)])
            torch.testing.assert_close(moved, alone, rtol=1e-14, atol=1e-14)
        assert moved.dtype is torch.float64
        results.append(moved.detach())
        slopes += torch.autograd.grad(moved.square().sum(), (x, y), materialize_grads=True)
    for one, other in zip([results[0], *slopes[:2]], [results[1], *slopes[2:]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_conditions_go_as_for_most_and_the_rest_is_named() -> None:
    recorder, x = BatchRecorder(None), torch.empty(2)
    members = [torch.full((2,), float(i)) for i in range(5)]
    recorder.hold(x, members, 0)
    with torch.no_grad(), recorder.numbers(), recorder:
        assert not x.sum().item() > 5  # 6 and 8 are
        assert recorder.follows == [[True, True, True, False, False]]
        assert x.sum().item() >= 2  # of 0, 2 and 4
    assert recorder.follows == [[False, True, True, False, False]]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.add, "parameters meet"),
        (lambda x, y: torch.stack([x, y]), "parameters meet"),
        (lambda x, y: max(x.sum().item(), y.sum().item()), "parameters meet"),
        (lambda x, y: float(x.sum()), "constants out of tensors"),
        (lambda x, y: x.tolist(), "constants out of tensors"),
        (lambda x, y: torch.rand(3), "draws numbers"),
        (lambda x, y: torch.cat([x, x], out=x), "another shape"),
    ],
)
def test_what_a_batch_cannot_do_is_refused(function, reason: str) -> None:
    recorder, x, y = BatchRecorder(None), torch.empty(2), torch.empty(2)
    recorder.hold(x, list(torch.rand(3, 2)), 0)
    recorder.hold(y, list(torch.rand(4, 2)), 1)
    with pytest.raises(TypeError, match=reason), torch.no_grad(), recorder.numbers(), recorder:
        function(x, y)
