"""Views of what is held beside a storage see what views of the storage would."""

import pytest
import torch
from torch import Tensor

from reweight._optimizers.held import Held, geometry_of, is_plain, scatter, storage_of, viewed

VIEWS = {
    "all": lambda t: t,
    "transposed": lambda t: t.T,
    "a row": lambda t: t[1],
    "a column": lambda t: t[:, 2],
    "flat": lambda t: t.view(-1),
    "every other": lambda t: t.view(-1)[1::2],
    "broadcast": lambda t: t[0].expand(3, 4),
}
MEMORY = {
    "its own": lambda: torch.empty(3, 4),
    "transposed": lambda: torch.empty(4, 3).T,
    "a part": lambda: torch.empty(24)[12:].view(3, 4),
    "columns": lambda: torch.empty(3, 8)[:, ::2],
}


@pytest.mark.parametrize("source", [lambda t: t, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_views_see_the_value(memory, view, source) -> None:
    place = memory()
    if (view is VIEWS["flat"] and not place.is_contiguous()) or view is VIEWS["every other"]:
        place = torch.empty(3, 4)
    whole = source(torch.randn(2, 3, 4))[1].requires_grad_(False)
    value = whole.detach().requires_grad_()
    held = Held(storage_of(place), value, geometry_of(place))
    seen, expected = viewed(held, value, view(place)), view(place.copy_(whole))
    assert torch.equal(seen, expected)
    c = torch.randn_like(seen)
    (slope,) = torch.autograd.grad(seen, value, c)
    leaf = whole.clone().requires_grad_()
    flat = leaf.contiguous() if view in (VIEWS["flat"], VIEWS["every other"]) else leaf
    torch.testing.assert_close(slope, torch.autograd.grad(view(flat), leaf, c)[0])


def test_a_value_is_put_where_it_lies() -> None:
    flat, value = torch.zeros(6).requires_grad_(), torch.ones(2, requires_grad=True)
    new = scatter(flat.clone(), value, geometry_of(torch.empty(3, 2)[1:, 1]))
    assert new.tolist() == [0, 0, 0, 1, 0, 1]
    slopes: tuple[Tensor, ...] = torch.autograd.grad(new.sum(), (flat, value))
    assert [slope.tolist() for slope in slopes] == [[1, 1, 1, 0, 1, 0], [1, 1]]


def test_classes_of_others_are_not_plain() -> None:
    assert is_plain(torch.nn.Parameter(torch.ones(1)))
    assert not is_plain(torch.nn.Buffer(torch.ones(1)).as_subclass(type("Own", (Tensor,), {})))
