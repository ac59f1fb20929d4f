"""What models of others do that a look-ahead could get wrong: exact, or refused with the reason."""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from cases import Fixed
from references import meta_objective
from reweight import MeanObjective, MetaReweightStep, linear_exit_cross_entropy
from reweight.losses import exit_cross_entropy

ESTIMATORS = ["auto", "finite_difference", "unrolled"]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (6,), generator=generator)


def make(model: nn.Module, **options) -> MetaReweightStep:
    weights = Fixed(torch.ones(6, 1).double())
    return MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        weights,
        objective=MeanObjective(),
        reweighter_optimizer=SGD(weights.parameters(), lr=1.0),
        **options,
    )


def hypergradient(model: nn.Module, train, meta, **options) -> Tensor:
    """∂L_meta/∂w, as a step of gradient descent with learning rate 1 shows it."""
    step = make(copy.deepcopy(model), **options)
    step.update_reweighter(train, meta)
    return 1 - step.reweighter.weights.detach()


def numerical(model: nn.Module, train, meta) -> Tensor:
    """The same by central differences of the whole objective around a real step."""
    slopes = []
    for i in range(6):
        values = []
        for sign in (1, -1):
            weights = Fixed(torch.ones(6, 1).double())
            weights.weights.data[i] += sign * 1e-5
            twin = copy.deepcopy(model)
            optimizer = SGD(twin.parameters(), lr=0.1)
            batches = [(x.clone(), y) for x, y in (train, meta)]
            wrapped = Listed(twin)
            values.append(
                meta_objective(
                    wrapped, optimizer, weights, *batches, lambda z, y: F.cross_entropy(z[0], y)
                )
            )
        slopes.append((values[0] - values[1]) / 2e-5)
    return torch.tensor(slopes, dtype=torch.float64).unsqueeze(1)


class Listed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model(x)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


class FromAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.kept[0], self.first.bias).tanh())


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_second_reference_to_a_parameter_is_refused(estimator: str) -> None:
    model = FromAList().double()
    step = make(model, estimator=estimator)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"got first\.weight, to which there is a second ref"):
        step.backward(batch(1), batch(2))
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


class FromAnAlias(Net):
    """Reads the memory of its first weight by another tensor that it has kept."""

    def __init__(self, keep: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        super().__init__()
        self.double()
        self.keep = keep(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((F.linear(x, self.keep()) + self.first(x)).tanh())


def in_a_closure(weight: Tensor) -> Callable[[], Tensor]:
    kept = weight.detach()
    return lambda: kept


def as_an_array(weight: Tensor) -> Callable[[], Tensor]:
    kept = torch.from_numpy(weight.detach().numpy())
    return lambda: kept


def in_a_view_of_data(weight: Tensor) -> Callable[[], Tensor]:
    kept = weight.data.view(-1)[5:]
    return lambda: F.pad(kept, (5, 0)).view(6, 5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("keep", [in_a_closure, as_an_array, in_a_view_of_data])
def test_another_tensor_over_the_memory_of_a_parameter_is_refused(keep, estimator: str) -> None:
    model = FromAnAlias(keep)
    step = make(model, estimator=estimator)
    for call in (step.backward, step.update_reweighter):
        with pytest.raises(ValueError, match=r"got first\.weight, to which there is a second ref"):
            call(batch(1), batch(2))
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_over_the_memory_of_a_parameter_is_refused() -> None:
    model = Net().double()
    model.register_buffer("row", model.first.weight.data[0])
    with pytest.raises(ValueError, match=r"got first\.weight, to which there is a second ref"):
        make(model).backward(batch(1), batch(2))


def test_data_that_the_forward_takes_anew_is_none_the_worse() -> None:
    model = FromAnAlias(lambda weight: None)
    model.keep = lambda: model.first.weight.data.clone() + model.first.weight.detach()
    make(model).backward(batch(1), batch(2))


def test_a_forward_may_ask_for_a_parameter_by_its_name() -> None:
    class ByName(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x, self.get_parameter("first.weight")).tanh())

    plain = Net().double()
    plain.first.bias = None
    model = ByName().double()
    model.load_state_dict(plain.state_dict(), strict=False)
    found = [make(each).update_reweighter(batch(1), batch(2)) for each in (plain, model)]
    assert torch.equal(*(each.hypergradient for each in found))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_parameter_in_the_loss_is_read_where_its_module_holds_it(estimator: str) -> None:
    model = Features().double()
    held = partial(linear_exit_cross_entropy, weight=model.head.weight)
    with pytest.raises(ValueError, match=r"got head\.weight, to which there is a second ref"):
        make(model, loss=lambda h, y: held(h, target=y), estimator=estimator).backward(
            batch(1), batch(2)
        )
    weights = []
    for loss, body in (
        (lambda h, y: linear_exit_cross_entropy(h, model.head.weight, y), model),
        (exit_cross_entropy, nn.Sequential(model, model.head)),
    ):
        step = make(body, loss=loss, estimator=estimator)
        step.update_reweighter(batch(1), batch(2))
        weights.append(step.reweighter.weights.detach())
    tolerance = 1e-4 if estimator == "finite_difference" else 1e-10
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance * 1e-2)


def test_a_post_accumulate_hook_is_refused() -> None:
    model = Net().double()
    step = make(model)
    model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    for call in (step.backward, step.update_reweighter):
        with pytest.raises(ValueError, match=r"no post-accumulate hook .* of first\.weight"):
            call(batch(1), batch(2))


def test_parameters_over_one_memory_are_refused() -> None:
    model = Net().double()
    model.head.weight = nn.Parameter(model.first.weight.data.view(-1)[:24].view(4, 6))
    with pytest.raises(ValueError, match=r"got first\.weight and head\.weight, which share"):
        make(model)


def test_parameters_side_by_side_in_one_memory_are_none_the_worse() -> None:
    model, memory = Net().double(), torch.randn(6, 10, dtype=torch.float64)
    model.first.weight = nn.Parameter(memory[:, ::2])
    model.head.weight = nn.Parameter(memory[:4, 1::2][:, :5])
    model.head.in_features = 5
    make(nn.Sequential(model.first, nn.Linear(6, 5).double(), model.head))


class Reversible(torch.autograd.Function):
    """Keeps no activations: its backward runs the function again, and a backward of it."""

    @staticmethod
    def forward(ctx, x: Tensor, function: nn.Module) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x).detach()

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(cotangent)
        return x.grad, None


class WithReversible(nn.Module):
    def __init__(self, is_reversible: bool = True) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.is_reversible = is_reversible

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = Reversible.apply(x, self.inner) if self.is_reversible else self.inner(x)
        return self.head(x)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_backward_within_the_backward_leaves_grad_alone(accumulated: bool) -> None:
    model = WithReversible().double()
    step = make(model)
    if accumulated:
        F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step.update_reweighter(batch(1), batch(2))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_a_backward_within_the_backward_adds_the_gradient_of_training() -> None:
    model = WithReversible().double()
    step = make(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = step.backward(batch(1), batch(2))
    losses = F.cross_entropy(model(batch(1)[0]), batch(1)[1], reduction="none")
    (losses * result.weights.squeeze(1)).mean().backward()
    for ours, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_backward_within_the_backward_is_part_of_the_hypergradient() -> None:
    model = WithReversible().double()
    plain = WithReversible(is_reversible=False).double()
    plain.load_state_dict(model.state_dict())
    with warnings.catch_warnings():  # of the cut, which is the backward's own here
        warnings.simplefilter("ignore")
        found = hypergradient(model, batch(1), batch(2), estimator="finite_difference")
    expected = hypergradient(plain, batch(1), batch(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), InPlace()], ids=["relu", "add"])
@pytest.mark.parametrize("options", [{}, {"lean": True}, {"lagged": True}], ids=str)
def test_a_forward_that_changes_its_input_does_so_once(layer: nn.Module, options) -> None:
    model = nn.Sequential(layer, Net()).double()
    step = make(model, **options)
    expected = layer(batch(1)[0])
    for _ in range(2):
        train, meta = batch(1), batch(2)
        result = step.backward(train, meta)
        assert torch.equal(train[0], expected)
        assert torch.equal(meta[0], batch(2)[0])
        assert result.backward_difference < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_forward_that_changes_its_input_has_the_hypergradient_of_a_copy(estimator: str) -> None:
    model = nn.Sequential(InPlace(), Net()).double()
    train, meta = batch(1), batch(2)
    found = hypergradient(model, train, meta, estimator=estimator)
    assert torch.equal(train[0], batch(1)[0])  # update_reweighter changes nothing
    tolerance = 1e-4 if estimator == "finite_difference" else 1e-6  # of differences
    torch.testing.assert_close(
        found, numerical(model, train, meta), rtol=tolerance, atol=tolerance * 1e-2
    )


def test_a_forward_that_begins_to_change_its_input_is_refused() -> None:
    class Sometimes(Net):
        changes = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1.0) if self.changes else x + 1)

    step = make(Sometimes().double())
    step.backward(batch(1), batch(2))
    step.model.changes = True
    with pytest.raises(ValueError, match="change its inputs in place in every forward or in none"):
        step.backward(batch(1), batch(2))


class Remembers(Net):
    """State in plain attributes: a number, a tensor changed in place, a list, what was seen."""

    def __init__(self, buffers: bool = False) -> None:
        super().__init__()
        self.calls, self.history = 0, []
        mean, calls = torch.zeros(6).double(), torch.zeros(())
        if buffers:
            del self.calls
            self.register_buffer("mean", mean)
            self.register_buffer("calls", calls)
        else:
            self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(x).tanh()
        with torch.no_grad():
            self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        self.history.append(self.calls)
        self.seen = hidden
        return self.head(hidden - self.mean / self.calls)


@pytest.mark.parametrize("estimator", ["auto", "unrolled"])
def test_state_in_plain_attributes_moves_as_in_training(estimator: str) -> None:
    model = Remembers().double()
    step, plain = make(copy.deepcopy(model), estimator=estimator), copy.deepcopy(model)
    for seed in (1, 2):
        step.backward(batch(seed), batch(3))
        plain(batch(seed)[0])
    ours = step.model
    assert ours.calls == plain.calls == 2
    assert ours.history == plain.history == [1, 2]
    assert torch.equal(ours.mean, plain.mean)
    assert torch.equal(ours.seen, plain.seen)
    assert torch.autograd.forward_ad.unpack_dual(ours.seen).tangent is None


@pytest.mark.parametrize("estimator", ["auto", "unrolled"])
def test_state_in_plain_attributes_counts_as_in_buffers(estimator: str) -> None:
    found = []
    for buffers in (False, True):
        torch.manual_seed(0)
        model = Remembers(buffers).double()
        model(batch(3)[0])
        model.seen = None  # has no deep copy
        found.append(hypergradient(model, batch(1), batch(2), estimator=estimator))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_update_reweighter_leaves_plain_attributes_alone() -> None:
    model = Remembers().double()
    mean = model.mean
    make(model).update_reweighter(batch(1), batch(2))
    assert model.calls == 0
    assert model.history == []
    assert model.mean is mean
    assert torch.equal(mean, torch.zeros(6).double())
    assert not hasattr(model, "seen")


class Bounded(nn.Embedding):
    """max_norm as the backward takes it: what the forward scales by is a constant."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(tokens)
        scale = (1 / (rows.norm(dim=-1, keepdim=True) + 1e-7)).clamp(max=1)
        return rows + (rows * scale - rows).detach()


@pytest.mark.parametrize("estimator", ["auto", "unrolled"])
def test_an_embedding_of_bounded_norm(estimator: str) -> None:
    def build(embedding: nn.Embedding) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(10, 4)).double()

    model = build(nn.Embedding(9, 5, max_norm=1.0))
    train, meta = ((torch.randint(9, (6, 2)), torch.randint(4, (6,))) for _ in range(2))
    before = model[0].weight.detach().clone()
    step = make(model, estimator=estimator)
    step.update_reweighter(train, meta)
    assert torch.equal(model[0].weight, before)
    plain = build(Bounded(9, 5))
    model(train[0])  # scales the rows of the train batch
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        1 - step.reweighter.weights.detach(),
        hypergradient(plain, train, meta),
        rtol=1e-6,  # the norm is that of a row scaled before
        atol=1e-10,
    )
