"""What a pass may change comes back bitwise: random state, buffers, attributes, ``.grad``."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from reweight._passes.snapshots import Beginning, Gradients


class Draws(nn.Module):
    """Draws from every generator that there is, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)
        self.inner = nn.Module()
        self.inner.deep = torch.Generator().manual_seed(4)

    def forward(self) -> tuple[object, ...]:
        numbers = [torch.rand(2, generator=g).tolist() for g in (self.own, self.inner.deep, None)]
        return *numbers, np.random.rand(), random.random()


def test_every_generator_of_the_model_draws_again() -> None:
    model = Draws()
    model()
    state = Beginning(model)
    first, following = model(), model()
    assert all(one != other for one, other in zip(first, following, strict=True))
    state.replay()
    assert (model(), model()) == (first, following)
    state.replay()  # as often as one likes
    assert model() == first


def test_buffers_come_back_whether_changed_or_replaced() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.append(model[0])
    x = torch.randn(5, 3)
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    beginning = Beginning(model)
    model(x)
    model[0].running_mean = model[0].running_mean + 1
    beginning.restore()
    assert all(one is other for one, other in zip(model.buffers(), buffers, strict=True))
    assert all(map(torch.equal, buffers, before))
    for name, buffer in model.named_buffers():
        assert torch.equal(beginning.buffers[name], buffer)
        assert beginning.buffers[name].data_ptr() != buffer.data_ptr()


def test_a_graph_that_holds_a_buffer_survives_the_way_back() -> None:
    model = nn.Module()
    model.register_buffer("factor", torch.tensor([2.0, 3.0]))
    beginning = Beginning(model)
    leaf = torch.ones(2, requires_grad=True)
    product = (leaf * model.factor).sum()
    beginning.restore()
    product.backward()
    assert leaf.grad.tolist() == [2.0, 3.0]


def test_plain_attributes_come_back_whether_changed_or_replaced() -> None:
    module = nn.Module()
    module.number, module.tensor, module.other = 1, torch.zeros(2), torch.zeros(2)
    module.list, module.dict, module.set = [1, 2], {"a": 1}, {1}
    tensor, contents = module.tensor, (module.list, module.dict, module.set)
    model = nn.Sequential(module)
    beginning = Beginning(model)
    module.number, module.other, module.new = 2, torch.ones(2), 3
    module.tensor.add_(1)
    module.list.append(3)
    module.dict["a"] = 2
    module.set.add(2)
    beginning.replay()
    assert module.number == 1
    assert module.tensor is tensor
    assert tensor.tolist() == module.other.tolist() == [0, 0]
    assert not hasattr(module, "new")
    assert (module.list, module.dict, module.set) == ([1, 2], {"a": 1}, {1})
    assert all(
        a is b for a, b in zip((module.list, module.dict, module.set), contents, strict=True)
    )


def test_what_containers_hold_comes_back() -> None:
    module = nn.Module()
    module.state = {"mean": torch.zeros(2), "queue": [torch.zeros(1)], "pair": (torch.zeros(1), [])}
    module.state["itself"] = module.state
    mean, (count, names) = module.state["mean"], module.state["pair"]
    beginning = Beginning(module)
    mean.add_(1)
    module.state["queue"][0] += 1
    module.state["queue"].append(torch.ones(1))
    count.add_(1)
    names.append("new")
    beginning.replay()
    assert module.state["mean"] is mean
    assert (mean.tolist(), count.tolist(), names) == ([0, 0], [0], [])
    assert [each.tolist() for each in module.state["queue"]] == [[0]]


@pytest.mark.parametrize("copy", [False, True])
def test_gradients_come_back(copy: bool) -> None:
    parameters = [torch.ones(2, requires_grad=True) for _ in range(2)]
    parameters[0].grad = gradient = torch.tensor([1.0, 2.0])
    gradients = Gradients(parameters, copy=copy)
    if copy:  # for a backward that adds to what is there
        sum(p.sum() for p in parameters).backward()
        assert gradient.tolist() == [2.0, 3.0]
    else:
        gradients.clear()
        assert all(p.grad is None for p in parameters)
        sum(p.sum() for p in parameters).backward()
    gradients.restore()
    with gradients.taken_away():
        assert all(p.grad is None for p in parameters)
    assert parameters[0].grad.tolist() == [1.0, 2.0]
    assert (parameters[0].grad is gradient) == (not copy)
    assert parameters[1].grad is None
