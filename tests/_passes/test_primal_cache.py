"""Recalled values are those computed again, bitwise, or they are not recalled."""

import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from cases import make_batch, make_model
from model_rows import ROWS, UNCOMPILED, set_up
from properties import assert_same, outcome
from reweight import MetaReweightStep, SampleReweighter
from reweight._kernels import composite, function
from reweight._passes import forward
from reweight._passes.memory import memory_of
from reweight._passes.primal_cache import Departure, PrimalCache, Recall

pytestmark = pytest.mark.usefixtures("all_is_large")


def forget(monkeypatch) -> None:
    monkeypatch.setattr(Recall, "find", lambda *args: None)


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
    assert sum(value.dim() == 4 for value in recalled) >= 3, "all convolutions"


def test_large_logits_are_recalled_and_change_nothing(recalled, monkeypatch) -> None:
    model = make_model("mlp")
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    monkeypatch.setattr(function, "_SMALL", 0)
    monkeypatch.setattr(composite, "_SMALL", 0)
    with_logits = outcome(model, train, meta)
    num_exits, logits = len(model(train[0])), model(train[0])[0]
    assert sum(value.shape == logits.shape for value in recalled) == num_exits
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
    assert any(value.dim() == 4 for value in recalled) == expected
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
    assert sum(value.dim() == 4 for value in recalled) >= num_convolutions


def noted(func, *args) -> tuple[PrimalCache, Tensor]:
    cache = PrimalCache()
    with cache:
        result = func(*args)
    return cache, result


def again(cache: PrimalCache, func, *args) -> Tensor | None:
    recall = cache.again()
    return recall.value(recall.find(func, args, {}))


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


def test_memory_handed_out_again_is_not_what_lay_there() -> None:
    """An argument has gone, and another is known by its memory, with the same version."""
    x = torch.randn(16)
    memory = memory_of(x)
    cache, result = noted(torch.mul, x, 2)
    del x
    others = []
    while not others or (memory_of(others[-1]) != memory and len(others) < 10_000):
        others.append(torch.randn(16))
    assert memory_of(others[-1]) == memory, "no memory was handed out again"
    assert all(again(cache, torch.mul, other, 2) is None for other in others)
    assert len(result) == 16  # which is still there


def test_memory_in_which_the_model_wrote_in_between() -> None:
    x, cache = torch.randn(3, 4), PrimalCache()
    weight = torch.randn(4, 4, requires_grad=True)
    with cache:
        whole = torch.tanh(x)
        before = F.linear(whole, weight)
        whole[0][1:].view(3).mul_(2)  # a view of a view
        after = F.linear(whole, weight)
    recall = cache.again()
    assert recall.value(recall.find(torch.tanh, (x,), {})) is None
    assert recall.find(F.linear, (whole, weight.detach()), {}) is not None
    assert not torch.equal(before, after)
    value = again(cache, F.linear, whole, weight.detach())
    assert torch.equal(value, after)


def test_another_number_is_another_call() -> None:
    x = torch.randn(3)
    for one, other in ((2, 2.0), (1, True), (0.0, -0.0), (0.5, 0.25)):
        cache, kept = noted(torch.mul, x, one)
        assert again(cache, torch.mul, x, other) is None
        assert torch.equal(again(cache, torch.mul, x, one), kept)


def test_equal_calls_are_found_in_their_order() -> None:
    """They may have drawn random numbers."""
    x, cache = torch.ones(64), PrimalCache()
    with cache:
        dropped = [F.dropout(x, 0.5), F.dropout(x, 0.5)]
        results = list(map(torch.relu, dropped))
    recall = cache.again()
    asked = F.dropout, (x,), {"p": 0.5, "training": True, "inplace": False}
    for result in results:
        other = torch.zeros(64)
        recall.note(recall.find(*asked), [other])
        assert torch.equal(recall.value(recall.find(torch.relu, (other,), {})), result)
    assert recall.find(*asked) is None


def test_memory_that_was_given_back_may_not_be_written() -> None:
    x = torch.randn(3)
    cache, result = noted(torch.tanh, x)
    recall = cache.again()
    value = recall.value(recall.find(torch.tanh, (x,), {}))
    assert value.data_ptr() == result.data_ptr()
    for func, args in ((Tensor.mul_, (value, 2)), (Tensor.data_ptr, (value[:1],))):
        with pytest.raises(Departure):
            recall.find(func, args, {})


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + x.sigmoid()


class OtherHalf(Half):
    """Which has never run with gradients: PyTorch keeps what it finds out by class."""


class Mean(nn.Module):
    def forward(self, x: Tensor) -> float:
        return float(x.mean())


class Odd(nn.Module):
    """Whose forward does what recall must go along with, or must notice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.count, self.seen = how, 0, [0.0]
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        if how.startswith("compiled"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of scripting, from 2.10 on
                kinds = {"compiled code, a number": Mean, "compiled code, no gradient": OtherHalf}
                self.script = torch.jit.script(kinds.get(how, Half)())
            if "before" in how:
                for _ in range(2):
                    self.script(torch.ones(2, 6, requires_grad=True).double()).sum().backward()

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.first(x)
        passes_differ = not hidden.requires_grad
        match self.how:
            case "compiled code":
                hidden = self.script(hidden)
            case "compiled code, no gradient" | "compiled code, gradients before":
                with torch.no_grad():
                    scale = self.script(hidden)
                hidden = hidden + scale
            case "compiled code, a number":
                hidden = hidden * self.script(hidden)
            case "branches by item":
                hidden = hidden * 2 if (x + hidden).sum().item() > 0 else -hidden
            case "branches by list":
                hidden = hidden * sum(len(row) for row in (x + hidden).tolist() if row[0] > 0)
            case "NumPy draws":
                hidden = hidden + torch.from_numpy(np.random.RandomState(0).randn(6))
            case "memory filled by NumPy":
                noise = torch.empty_like(hidden, requires_grad=False)
                noise.numpy()[:] = np.random.RandomState(len(x)).randn(*noise.shape)
                hidden = hidden + noise
            case "counts":
                self.count += 1
                hidden = hidden * self.count
            case "written in place":
                hidden = torch.sigmoid(hidden) * 3
                hidden[:, 1:][:, ::2].mul_(2)
                hidden = F.relu(hidden, inplace=True)
            case "frozen, in place":
                constant = self.frozen(x)
                F.relu(constant, inplace=True)
                hidden = hidden + self.frozen(constant)
            case "argument written after a copy":
                turned = (x + hidden).t()
                copy, again = turned.reshape(6, -1), turned.contiguous()
                turned.mul_(3)
                hidden = again.t() * copy.t() + turned.t()
            case "intermediate values that have gone":
                for k in range(4):
                    hidden = (hidden + torch.full_like(hidden, k)).sin()
        mixed = self.norm(x + hidden)
        if self.how == "running statistics are read":
            mixed = mixed * (1 + self.norm.running_mean).detach()
        if self.how == "running statistics are used":
            mixed = mixed + F.batch_norm(mixed, self.norm.running_mean, self.norm.running_var)
        mixed = mixed.tanh()
        if self.how == "a value is written" and passes_differ:
            mixed.mul_(1)
        return [self.head(mixed + self.second(mixed))]


@pytest.mark.parametrize(
    "how",
    [
        "compiled code",
        "compiled code, no gradient",
        "compiled code, gradients before",
        "compiled code, a number",
        "branches by item",
        "branches by list",
        "NumPy draws",
        "memory filled by NumPy",
        "counts",
        "written in place",
        "frozen, in place",
        "argument written after a copy",
        "intermediate values that have gone",
        "running statistics are read",
        "running statistics are used",
        "a value is written",
    ],
)
def test_odd_forwards_are_exact(how: str) -> None:
    torch.manual_seed(0)
    model = Odd(how).double()
    train, meta = ((torch.randn(8, 6).double(), torch.randint(4, (8,))) for _ in range(2))
    found, expected = (
        outcome(model, train, meta, estimator=estimator) for estimator in ("forward", "unrolled")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # rounding


def test_recall_never_runs_what_checkpointing_would() -> None:
    runs = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            def block(x: Tensor) -> Tensor:
                runs.append(torch.is_grad_enabled())
                return self.first(x).relu().tanh().mean(1, keepdim=True).expand(-1, 8)

            return self.head(checkpoint(block, x, use_reentrant=False))

    model = Net().double()
    step = MetaReweightStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SampleReweighter(1, form="sigmoid")
    )
    train, meta = (
        (torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)
    )
    step.backward(train, meta)
    runs.clear()
    step.backward(train, meta)
    assert len(runs) == 6, "three forwards, and one more for each of three backwards"
