"""Both ways to what the weights do are compared at every update, by every estimator."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from cases import Fixed, HalvedBackward
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from reweight._meta.consistency import Later, blame

ESTIMATORS = ["forward", "finite_difference", "unrolled"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(HalvedBackward.apply(self.first(x).tanh())).tanh())


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (8,), generator=generator)


def make(model: nn.Module | None = None, lr: float = 0.1, **options) -> MetaReweightStep:
    torch.manual_seed(0)
    model = (Net() if model is None else model).double()
    weights = Fixed(torch.rand(8, 1).double() + 0.5)
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    return MetaReweightStep(
        model,
        optimizer,
        weights,
        objective=MeanObjective(),
        reweighter_optimizer=SGD(weights.parameters(), lr=0.0),
        **options,
    )


@pytest.fixture(autouse=True)
def right_backward(monkeypatch) -> None:
    monkeypatch.setattr(HalvedBackward, "on", False)


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_difference_of_a_right_backward_is_rounding(estimator: str, lagged: bool) -> None:
    if lagged and estimator == "unrolled":
        return
    step = make(estimator=estimator, lagged=lagged)
    tolerance = 1e-4 if estimator == "finite_difference" else 1e-12
    for seed in range(3):
        step.backward(batch(seed), batch(9))  # what stands in .grad is no part of the comparison
        result = step.backward(batch(seed), batch(9), scale=0.5)
        assert 0 <= result.backward_difference < tolerance
        step.optimizers[0].step()


@pytest.mark.parametrize("estimator", ["forward", "finite_difference"])
def test_the_difference_of_a_wrong_backward_is_reported(estimator: str, monkeypatch) -> None:
    monkeypatch.setattr(HalvedBackward, "on", True)
    step = make(estimator=estimator)
    with pytest.warns(UserWarning, match="do not agree with the backward"):
        result = step.backward(batch(1), batch(2))
    assert result.backward_difference > 1e-3


def test_the_warning_names_the_parameters_that_it_comes_from(monkeypatch) -> None:
    monkeypatch.setattr(HalvedBackward, "on", True)
    with pytest.warns(UserWarning, match="do not agree") as caught:
        make().backward(batch(1), batch(2))
    assert "through first.weight, first.bias. " in str(caught[0].message)


def test_what_goes_wrong_later_is_told_at_the_next_update(monkeypatch) -> None:
    step = make()
    step.backward(batch(1), batch(2))
    monkeypatch.setattr(HalvedBackward, "on", True)
    step.backward(batch(1), batch(2))  # nothing waits for what its check came to
    with pytest.warns(UserWarning, match="do not agree with the backward"):
        step.backward(batch(1), batch(2))


def test_after_three_failures_auto_takes_another_way_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(HalvedBackward, "on", True)
    step = make()
    with pytest.warns(UserWarning, match="do not agree"):
        step.backward(batch(1), batch(2))
    step.backward(batch(1), batch(2))
    assert step.estimator == "auto"
    step.backward(batch(1), batch(2))
    assert step.estimator == "unrolled"
    assert "estimator='unrolled' from here on" in caplog.text
    result = step.backward(batch(1), batch(2))
    assert result.backward_difference < 1e-12
    expected = make(step.model, estimator="unrolled").update_reweighter(batch(1), batch(2))
    found = make(step.model)
    found._estimator = step._estimator
    found = found.update_reweighter(batch(1), batch(2))
    torch.testing.assert_close(found.hypergradient_norm, expected.hypergradient_norm)


def test_a_single_failure_is_not_counted_with_others_long_after(monkeypatch) -> None:
    step = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for on in ([True] + [False] * 12) * 3:
            monkeypatch.setattr(HalvedBackward, "on", on)
            step.backward(batch(1), batch(2))
    assert step.estimator == "auto"


def test_failures_of_every_other_update_are_told(monkeypatch) -> None:
    step = make()
    for number in range(7):  # the first is looked at, and passes
        monkeypatch.setattr(HalvedBackward, "on", number % 2 == 1)
        is_told = number == 6  # where the last of three is read
        with pytest.warns(match="in some updates") if is_told else nullcontext():
            step.backward(batch(1), batch(2))
        assert (step.estimator == "auto") is not is_told


@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
def test_no_alarm_where_the_hypergradient_is_0(estimator: str) -> None:
    step = make(lr=0.0, estimator=estimator)
    for _ in range(3):
        result = step.backward(batch(1), batch(2))
    assert result.hypergradient_norm == 0
    assert result.backward_difference == 0


def test_no_alarm_in_low_precision() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = Net()
        step = make(model)
        step.model.bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                step(batch(seed, torch.bfloat16), batch(9, torch.bfloat16))


@pytest.mark.parametrize("estimator", ["forward", "finite_difference"])
def test_no_alarm_where_a_batch_is_known_by_heart(estimator: str) -> None:
    for seed in range(6):  # of which one or two would raise it in float32
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
        x = torch.randn(64, 5)
        target = model(x).argmax(1)
        with torch.no_grad():
            for parameter in model[2].parameters():
                parameter *= 30
            sure = F.cross_entropy(model(x), target, reduction="none") < 1e-4
        learned = x[sure][:16], target[sure][:16]
        step = MetaReweightStep(
            model,
            SGD(model.parameters(), lr=0.1),
            SampleReweighter(1),
            objective=MeanObjective(),
            estimator=estimator,
        )
        step.update_reweighter(learned, (torch.randn(16, 5), torch.randint(4, (16,))))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_comes_back_has_no_graph(estimator: str) -> None:
    for result in (
        make(estimator=estimator).backward(batch(1), batch(2)),
        make(estimator=estimator).update_reweighter(batch(1), batch(2)),
    ):
        found = [*result, *result.losses]
        assert not any(each.requires_grad for each in found if isinstance(each, Tensor))


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_low_precision_are_checked_in_a_higher_one(dtype, model_dtype) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none").unsqueeze(1).to(dtype)

    torch.manual_seed(0)
    model = Net().to(model_dtype)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        SampleReweighter(1, form="sigmoid").to(dtype),
        objective=MeanObjective(),
        loss=loss,
    )
    for _ in range(2):  # the second reads what the first came to
        result = step.backward(batch(1, model_dtype), batch(2, model_dtype))
        assert result.backward_difference.dtype == torch.float32
        assert result.backward_difference < torch.finfo(dtype).eps ** (1 / 3)


def test_learning_from_some_rows_is_checked_now_and_then(monkeypatch) -> None:
    step = make(train_fraction=0.5)
    told = [step.backward(batch(1), batch(2)).backward_difference for _ in range(65)]
    assert [i for i, each in enumerate(told) if each is not None] == [0, 64]


def test_blame_finds_the_parameters_by_halves() -> None:
    names, wrong, looks = [f"p{i}" for i in range(64)], {"p3", "p40"}, []

    def differs(some: list[str]) -> bool:
        looks.append(some)
        return bool(wrong & set(some))

    assert blame(names, differs, passes=100) == ["p3", "p40"]
    assert len(looks) <= 24
    assert blame(names, differs, passes=3) == []


def test_later_gives_the_number() -> None:
    assert Later(torch.tensor(0.25)).read() == 0.25
