"""A call gives what the same call gave in the forward, or the pass is run without recall."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from properties import outcome
from reweight._passes.fast_rules import BY_OUTPUT, BY_TANGENT
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.recall import Departure


def noted(func, *tensors) -> tuple[PrimalCache, Tensor]:
    cache = PrimalCache()
    with cache:
        result = func(*tensors)
    return cache, result


def again(cache: PrimalCache, func, *tensors) -> Tensor | None:
    recall = cache.again(BY_TANGENT, BY_OUTPUT)
    call, _ = recall.find(func, tensors, {}, list(tensors))
    return None if call is None else recall.value(call)


def test_only_the_very_same_is_recalled() -> None:
    x, weight = torch.zeros(2, 4), torch.randn(3, 4, requires_grad=True)
    cache, result = noted(F.linear, x, weight)
    value = again(cache, F.linear, x, weight.detach())
    assert value.data_ptr() == result.data_ptr(), "as it is, without a copy"
    assert again(cache, F.linear, x.clone(), weight.detach()) is None
    assert again(cache, F.linear, x.view(torch.int32).view(2, 4), weight.detach()) is None
    assert again(cache, F.linear, x[:1], weight.detach()) is None
    assert again(cache, torch.mul, x, weight.detach()) is None
    with torch.no_grad():
        weight.add_(1)
    assert again(cache, F.linear, x, weight.detach()) is None
    cache, result = noted(F.linear, x, weight)
    del result
    assert again(cache, F.linear, x, weight.detach()) is None, "not kept alive"


def test_another_number_is_another_call() -> None:
    x = torch.randn(3)
    for one, other in ((2, 2.0), (1, True), (0.0, -0.0), (0.5, 0.25)):
        cache, kept = noted(torch.mul, x, one)
        recall = cache.again(BY_TANGENT, BY_OUTPUT)
        assert recall.find(torch.mul, (x, other), {}, [x])[0] is None
        assert torch.equal(recall.value(recall.find(torch.mul, (x, one), {}, [x])[0]), kept)


def test_equal_calls_are_found_in_their_order() -> None:
    """They may have drawn random numbers."""
    x, cache = torch.ones(64), PrimalCache()
    with cache:
        results = [F.dropout(x, 0.5), F.dropout(x, 0.5)]
    recall = cache.again(BY_TANGENT, BY_OUTPUT)
    asked = F.dropout, (x,), {"p": 0.5, "training": True, "inplace": False}, [x]
    for result in results:
        call, _ = recall.find(*asked)
        assert torch.equal(recall.value(call), result)
    assert recall.find(*asked)[0] is None


def test_memory_that_was_given_back_may_not_be_written() -> None:
    x = torch.randn(3)
    cache, result = noted(torch.sin, x)
    recall = cache.again(BY_TANGENT, BY_OUTPUT)
    value = recall.value(recall.find(torch.sin, (x,), {}, [x])[0])
    assert value.data_ptr() == result.data_ptr()
    with pytest.raises(Departure):
        recall.find(Tensor.mul_, (value, 2), {}, [value])


class Odd(nn.Module):
    """Whose second forward is another, in a way that recall cannot go along with."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.first(x)
        again = not hidden.requires_grad
        mixed = self.norm(x + hidden)
        if self.how == "a value that had gone is read" and again:
            mixed = mixed + 0 * hidden.exp()
        if self.how == "running statistics are read":
            mixed = mixed * (1 + self.norm.running_mean).detach()
        if self.how == "a value is written" and again:
            mixed = mixed.tanh()
            mixed.mul_(1)
        else:
            mixed = mixed.tanh()
        return [self.head(mixed + self.second(mixed))]


@pytest.mark.parametrize(
    "how",
    ["a value that had gone is read", "running statistics are read", "a value is written"],
)
def test_a_pass_that_departs_is_run_without_recall(how: str) -> None:
    torch.manual_seed(0)
    model = Odd(how).double()
    train, meta = ((torch.randn(8, 6).double(), torch.randint(4, (8,))) for _ in range(2))
    found, expected = (
        outcome(model, train, meta, estimator=estimator) for estimator in ("forward", "unrolled")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # rounding
