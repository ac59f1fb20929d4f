"""Recalled values are those computed again, bitwise, or they are not recalled."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from cases import make_batch, make_model
from properties import assert_same, outcome
from reweight import MetaReweightStep, SampleReweighter
from reweight._kernels import composite, function
from reweight._passes import forward
from reweight._passes.recall import Recall
from test_models import ROWS, UNCOMPILED, set_up


def forget(monkeypatch) -> None:
    monkeypatch.setattr(Recall, "find", lambda *args: (None, False))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize("name", UNCOMPILED)
def test_recalled_values_change_nothing(name: str, recalled, monkeypatch) -> None:
    model, _, train, meta = set_up(ROWS[name])
    with_recall = outcome(model, train, meta)
    forget(monkeypatch)
    assert_same(outcome(model, train, meta), with_recall)


def test_products_whose_values_the_graph_holds_are_recalled(recalled, monkeypatch) -> None:
    model, train, meta = (
        make_model("conv_batch_norm"),
        make_batch("conv_batch_norm"),
        make_batch("conv_batch_norm", seed=2),
    )
    outcome(model, train, meta)
    assert sum(func is F.conv2d for func, _ in recalled) == 3, "all convolutions"


def test_large_logits_are_recalled_and_change_nothing(recalled, monkeypatch) -> None:
    model = make_model("mlp")
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    monkeypatch.setattr(function, "_SMALL", 0)
    monkeypatch.setattr(composite, "_SMALL", 0)
    with_logits = outcome(model, train, meta)
    num_exits, logits = len(model(train[0])), model(train[0])[0]
    assert sum(f is F.linear and value.shape == logits.shape for f, value in recalled) == num_exits
    monkeypatch.setattr(forward, "logits_kept", lambda kept: nullcontext())
    assert_same(outcome(model, train, meta), with_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recalled_values_change_nothing_under_autocast(dtype, recalled, monkeypatch) -> None:
    model = make_model("conv_batch_norm").float()
    train, meta = (
        (inputs.float(), target)
        for inputs, target in (make_batch("conv_batch_norm"), make_batch("conv_batch_norm", seed=2))
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with_recall = outcome(model, train, meta)
        forget(monkeypatch)
        assert_same(outcome(model, train, meta), with_recall)


class Layer(nn.Module):
    """A convolution to whose input or output something happens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.noise = how, random.Random(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.how == "another draw":
            x = x * self.noise.random()
        y = self.conv(x)
        change = CHANGES.get(self.how)
        if change is not None:
            change(y)
        z = y.sin()  # whose graph holds y
        if self.how == "output changed in the forward-mode pass" and not y.requires_grad:
            y.mul_(2)
        return [self.head(z.mean((2, 3)))]


def replace_data(y: Tensor) -> None:
    y.data = y.detach() * 2


CHANGES = {
    "output changed": lambda y: y.relu_(),
    "view of the output changed": lambda y: y[0].mul_(2),
    "data changed": lambda y: y.data.mul_(2),
    "data of a view changed": lambda y: y[0].data.mul_(2),
    "data replaced": replace_data,
    "array changed": lambda y: np.multiply(y.detach().numpy(), 2, out=y.detach().numpy()),
}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("nothing", True),
        pytest.param(
            "another draw",
            False,  # and the step says that the forward differs
            marks=pytest.mark.filterwarnings("ignore:Hypergradients do not agree"),
        ),
        *((change, False) for change in CHANGES),
        ("output changed in the forward-mode pass", True),
    ],
)
def test_a_stale_value_is_not_recalled(how: str, expected: bool, recalled, monkeypatch) -> None:
    model = Layer(how).double()
    train, meta = (
        (torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(2)
    )
    with_recall = outcome(model, train, meta)
    assert any(func is F.conv2d for func, _ in recalled) == expected
    forget(monkeypatch)
    assert_same(outcome(model, train, meta), with_recall)


def test_what_waits_is_recalled_not_computed_again(recalled) -> None:
    """The products of the last forward are found at the copies of the weights."""
    model, (inputs, target) = make_model("conv_batch_norm"), make_batch("conv_batch_norm")
    optimizer = AdamW(model.parameters(), lr=0.05)
    step = MetaReweightStep(model, optimizer, SampleReweighter(3).double(), lagged=True)
    train = inputs.repeat(256, 1, 1, 1), target.repeat(256)
    step(train)
    step(train)
    num_convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in step.model.modules())
    assert num_convolutions
    assert sum(func is F.conv2d for func, _ in recalled) >= num_convolutions
