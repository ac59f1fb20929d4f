"""Values that nothing reads are not computed; all that something reads are there when it does."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from properties import assert_same, outcome
from reweight._passes.deferred import Deferred
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import Recall

pytestmark = pytest.mark.usefixtures("all_is_large")


class Scaled(torch.autograd.Function):
    """Keeps nothing for its backward, and no mode sees what it does, as with kernels in C."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 2 * tangent


def doubled(x: Tensor) -> Tensor:
    return x + x


def in_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        best = y.argmax(-1)
    return y + F.one_hot(best, y.shape[-1])


def changed_in_place(y: Tensor) -> Tensor:
    z = torch.ones_like(y)
    z += y
    return z


def view_changed(y: Tensor) -> Tensor:
    y.unflatten(-1, (2, 3)).select(1, 0).add_(1)
    return y


def without_autocast(y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.where(y > 0, y.to(torch.promote_types(y.dtype, torch.float32)), 0)


def as_array(y: Tensor) -> Tensor:
    array = (y.float() if y.dtype is torch.bfloat16 else y).detach().numpy()
    return y + torch.from_numpy(array.copy())


def normalised(y: Tensor) -> Tensor:
    z = F.batch_norm(y, None, None, y[0], y[1], training=True)
    return torch.where(z > 0, z + y, y)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, since different versions in different ways
    scripted = torch.jit.script(doubled)

READERS = {
    "nothing": lambda y: y + 1,
    "views": lambda y: y.unflatten(-1, (2, 3)).transpose(1, 2).flatten(1).sin(),
    "dropout that is off": lambda y: F.dropout(y, 0.0) + 1,
    "dropout": lambda y: F.dropout(y, 0.5) + 1,
    "dropout and a comparison": lambda y: torch.where((z := F.dropout(y)) > 0, z, y),
    "dropout in place": lambda y: F.dropout(y, inplace=True),
    "kept after dropout": lambda y: (F.dropout(y) + 1).sin(),
    "sum": lambda y: (y + y * 2).relu(),
    "sum and comparison": lambda y: torch.where((z := y - y * 2) > 0, z, y),
    "sum changed in place": lambda y: (y + y * 2).add_(1).add_(y),
    "normalised": lambda y: (F.batch_norm(y, None, None, training=True) + y).relu(),
    "normalised and comparison": normalised,
    "comparison": lambda y: torch.where(y > 0, y, 0),
    "comparison of a view": lambda y: torch.where(y.view(-1).view_as(y) > 0, y, 0),
    "best class": in_no_grad,
    "number": lambda y: y + y[0, 0].item(),
    "array": as_array,
    "place": changed_in_place,
    "view changed": view_changed,
    "custom Function": lambda y: torch.where(Scaled.apply(y) > 0, y, 0),
    "TorchScript": lambda y: scripted(y),
    "vmap": lambda y: torch.vmap(lambda row: row.roll(1))(y),
    "index": lambda y: y[torch.arange(len(y)).flip(0)] + 1,
    "without autocast": without_autocast,
}


class Model(nn.Module):
    """Somebody may read what a product gave, which nothing keeps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.read = READERS[name]
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(self.read(self.first(x)).tanh())]


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(8, 5, dtype=dtype), torch.randint(4, (8,))) for _ in range(2)]


@pytest.fixture
def put_off(monkeypatch) -> list[torch.Size]:
    """The shapes of the values that were put off."""
    found: list[torch.Size] = []
    original = Deferred.put_off

    def observed(self, like, *args):
        found.append(like.shape)
        return original(self, like, *args)

    monkeypatch.setattr(Deferred, "put_off", observed)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READERS)
def test_putting_off_changes_nothing(name: str, dtype: torch.dtype, put_off, monkeypatch) -> None:
    is_low = dtype is torch.bfloat16
    model = Model(name).to(torch.float32 if is_low else dtype)
    train, meta = batches(torch.float32 if is_low else dtype)
    with torch.autocast("cpu", dtype, is_low):
        found = outcome(model, train, meta)
        assert torch.Size([8, 6]) in put_off
        monkeypatch.setattr(Recall, "find", lambda *args: None)
        assert_same(found, outcome(model, train, meta))


class OnStrided(nn.Module):
    """What a linear layer gives is contiguous, whatever its input is, and views rely on that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = self.second(self.first(x).view(4, 2, 6).transpose(0, 1)).view(8, 6)
        return [self.head(rows * (rows > 0))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_waits_lies_in_memory_as_in_the_forward(dtype, put_off, monkeypatch, caplog) -> None:
    model = OnStrided().to(dtype)
    train, meta = batches(dtype)
    found = outcome(model, train, meta)
    assert torch.Size([2, 4, 6]) in put_off
    monkeypatch.setattr(Recall, "find", lambda *args: None)
    assert_same(found, outcome(model, train, meta))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "expected"),
    [("views", 0), ("kept after dropout", 0), ("comparison", 1), ("sum and comparison", 2)],
)
def test_what_nothing_reads_is_not_computed(name: str, expected: int, monkeypatch) -> None:
    computed: list[torch.Size] = []
    fill = Deferred._fill

    def observed(self, key) -> None:
        place = self._places.get(key)
        if place is not None and not place.memory.expired():
            computed.append(place.size)
        fill(self, key)

    monkeypatch.setattr(Deferred, "_fill", observed)
    outcome(Model(name).double(), *batches(torch.float64))
    assert computed.count(torch.Size([8, 6])) == expected


def test_losses_that_are_a_product_have_their_values(put_off) -> None:
    """Which the step reads after the pass."""
    torch.manual_seed(0)
    model, (train, meta) = nn.Linear(5, 8).double(), batches(torch.float64)
    losses = {"exits": lambda outputs: outputs, "loss": lambda outputs, target: outputs}
    found, expected = (
        outcome(model, train, meta, estimator=estimator, **losses)
        for estimator in ("forward", "unrolled")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class ChangesItsArgument(nn.Module):
    """The product has a weight that nothing trains, so that no graph keeps its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.head = nn.Parameter(torch.ones(5)), nn.Linear(6, 4)
        self.register_buffer("weight", torch.randn(6, 5))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x + self.bias
        y = F.linear(x, self.weight)
        x.mul_(2)
        return [self.head(torch.where(y > 0, y, 0))]


def test_arguments_that_were_changed_since_end_recall(put_off, monkeypatch) -> None:
    ends: list[bool] = []
    give_up = Ladder.give_up_recall
    monkeypatch.setattr(Ladder, "give_up_recall", lambda self: (ends.append(True), give_up(self)))
    torch.manual_seed(0)
    model, (train, meta) = ChangesItsArgument().double(), batches(torch.float64)
    found = outcome(model, train, meta)
    assert put_off
    assert len(ends) == 1
    monkeypatch.setattr(Recall, "find", lambda *args: None)
    assert_same(found, outcome(model, train, meta))
