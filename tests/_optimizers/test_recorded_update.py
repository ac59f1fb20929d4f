"""The look-ahead of any optimizer, as ``pseudo_update`` and the public door give it."""

import copy
import logging
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn, optim

from cases import Fixed, conventional_loss, make_batch, make_model, warm_up
from properties import assert_same
from references import meta_objective
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from reweight._optimizers.pseudo_update import pseudo_update
from steps import STEPS, Lookahead, MuonAndAdam, Sam, ScheduleFree, Taken, TrustRatio


def look_ahead(taken: Taken):
    """θ̂, the gradients, and how many entries were cut, which changes as backwards are run."""
    leaves = taken.leaves()
    update = pseudo_update([taken.optimizer], taken.named, leaves)
    return update.parameters, leaves, update.num_zero_moments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_the_next_step_and_nothing_changes(name: str, dtype: torch.dtype, caplog) -> None:
    taken = Taken(STEPS[name], dtype)
    state = copy.deepcopy(taken.optimizer.state_dict())
    versions = [p._version for p in taken.parameters]
    random = torch.get_rng_state()
    for _ in range(2):  # verified, then as it is ever after
        moved, _, _ = look_ahead(taken)
    assert torch.equal(random, torch.get_rng_state())
    assert_same(taken.optimizer.state_dict(), state)
    assert versions == [p._version for p in taken.parameters]
    assert all(map(torch.equal, moved.values(), taken.step(taken.gradients)))
    assert not caplog.records


@pytest.mark.parametrize("make", [optim.NAdam, partial(optim.Adam, amsgrad=True)])
def test_entries_without_derivative_are_cut_and_counted_once(make) -> None:
    taken = Taken(make)
    taken.gradients[0][1] = 0
    for p in taken.parameters[:1]:
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            if name in taken.optimizer.state[p]:
                taken.optimizer.state[p][name][1] = 0
    moved, leaves, num_cut = look_ahead(taken)
    assert num_cut == 3  # the step goes entry by entry
    for _ in range(2):
        (v,) = torch.autograd.grad(moved["0"].sum(), leaves["0"], retain_graph=True)
        assert num_cut == 3
        assert not v[1].any()
        assert v.isfinite().all()
        assert v[0].any()


def test_entries_are_cut_of_every_parameter_and_others_stay() -> None:
    taken = Taken(optim.NAdam)
    for gradient, p in zip(taken.gradients, taken.parameters, strict=True):
        gradient.view(-1)[0] = 0
        taken.optimizer.state[p]["exp_avg_sq"].view(-1)[0] = 0
    moved, leaves, num_cut = look_ahead(taken)
    found = torch.autograd.grad(sum(m.sum() for m in moved.values()), list(leaves.values()))
    assert num_cut == len(found)
    for v in found:
        assert v.view(-1)[0] == 0
        assert v.view(-1)[1:].all()
        assert v.isfinite().all()


def test_what_is_not_finite_for_another_reason_stays_so() -> None:
    taken = Taken(optim.NAdam)
    moved, leaves, num_cut = look_ahead(taken)
    cotangent = torch.full((4, 3), math.nan).double()
    (v,) = torch.autograd.grad(moved["0"], leaves["0"], cotangent)
    assert v.isnan().all()
    assert num_cut == 0


def test_a_step_that_stands_still_has_derivative_0() -> None:
    taken = Taken(lambda parameters: optim.NAdam(parameters, lr=0.0))
    moved, leaves, _ = look_ahead(taken)
    for v in torch.autograd.grad(sum(m.sum() for m in moved.values()), list(leaves.values())):
        assert not v.any()


def refused(optimizer: optim.Optimizer, *parameters: nn.Parameter) -> str:
    gradients = {str(i): torch.ones_like(p) for i, p in enumerate(parameters)}
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(TypeError, match="must have a step that can be differentiated") as refusal:
        pseudo_update([optimizer], {str(i): p for i, p in enumerate(parameters)}, gradients)
    assert_same(optimizer.state_dict(), state)
    return str(refusal.value)


def test_an_error_of_the_step_names_the_class_and_says_what_to_do() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = ScheduleFree([p])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.eval()
    message = refused(optimizer, p)
    assert "got ScheduleFree: its step raises RuntimeError: Not in train mode" in message
    assert "call optimizer.train() before" in message
    assert "pseudo_update='gradient_descent'" in message


def test_two_passes_are_refused_with_the_way_that_works() -> None:
    p = nn.Parameter(torch.ones(2))
    message = refused(Sam([p], optim.SGD, lr=0.1), p)
    assert "Pass its `base_optimizer`" in message
    assert "update_reweighter before its two passes" in message


def test_operations_of_others_are_refused() -> None:
    @torch.library.custom_op("reweight_tests::step", mutates_args=("p",))
    def kernel(p: Tensor, g: Tensor) -> None:
        p.sub_(g)

    class Kernel(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                kernel(p, p.grad)

    p = nn.Parameter(torch.ones(2))
    assert "calls reweight_tests.step.default, which is not an operation of" in refused(
        Kernel([p]), p
    )
    assert torch.equal(p, torch.ones(2))


def slope_through(step_of, make, **options) -> tuple[float, float]:
    """⟨∂L_meta/∂w, direction⟩ through the public door, and by differences of real steps."""
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    model = make_model("mlp")
    optimizers = make(model)
    for one in optimizers:
        warm_up(model, one, train)
    weights = 1 + torch.rand(len(train[1]), 3, dtype=torch.float64)
    recording = Fixed(weights)
    MetaReweightStep(
        model,
        optimizers if len(optimizers) > 1 else optimizers[0],
        recording,
        reweighter_optimizer=optim.SGD(recording.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    ).update_reweighter(train, meta)
    hypergradient = weights - recording.weights.detach()
    direction = torch.randn_like(weights)

    def objective(sign: int) -> float:
        moved = Fixed(weights + sign * 1e-5 * direction)
        return step_of(model, optimizers, moved, train, meta)

    return (hypergradient * direction).sum().item(), (objective(1) - objective(-1)) / 2e-5


def exit_losses(model: nn.Module, batch) -> Tensor:
    losses = [nn.functional.cross_entropy(z, batch[1], reduction="none") for z in model(batch[0])]
    return torch.stack(losses, 1)


def one_step(model, optimizers, reweighter, train, meta) -> float:
    (optimizer,) = optimizers
    return meta_objective(model, optimizer, reweighter, train, meta, conventional_loss)


def each_its_own(model, optimizers, reweighter, train, meta) -> float:
    """``meta_objective``, with several optimizers."""
    model, optimizers = copy.deepcopy((model, optimizers))
    losses = exit_losses(model, train)
    model.zero_grad()
    (reweighter(None).detach() * losses).mean(0).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        return conventional_loss(model(meta[0]), meta[1]).item()


def test_the_hypergradient_of_a_numbers_step_through_the_public_door() -> None:
    found, expected = slope_through(one_step, lambda model: [TrustRatio(model.parameters())])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
def test_two_algorithms_as_two_optimizers(estimator: str) -> None:
    def make(model: nn.Module) -> list[optim.Optimizer]:
        parameters = list(model.parameters())
        return [
            optim.NAdam([p for p in parameters if p.dim() == 2], lr=0.01),
            optim.AdamW([p for p in parameters if p.dim() != 2], lr=0.01),
        ]

    found, expected = slope_through(each_its_own, make, estimator=estimator)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: MuonAndAdam(model.parameters()),
        lambda model: ScheduleFree(model.parameters()),
        lambda model: Lookahead(optim.Adam(model.parameters(), lr=0.01)),
    ],
    ids=["two algorithms in one class", "schedule-free", "lookahead"],
)
def test_wrappers_and_modes_train_through_the_public_door(make) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizer = make(model)
    step = MetaReweightStep(model, optimizer, SampleReweighter(3).double())
    losses = [step(train, meta).train_loss for _ in range(6)]
    result = step(train, meta)
    assert losses[-1] < losses[0]
    assert result.hypergradient_norm > 0


def test_two_passes_train_as_the_recipe_says() -> None:
    """Both passes with the same weights: what is learned looks ahead by the base optimizer."""
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizer = Sam(model.parameters(), optim.SGD, lr=0.1)
    reweighter = SampleReweighter(3).double()
    step = MetaReweightStep(model, optimizer.base_optimizer, reweighter)
    losses = []
    for _ in range(5):
        weights = step.update_reweighter(train, meta).weights
        for take in (optimizer.first_step, optimizer.second_step):
            exits = exit_losses(model, train)
            (weights * exits).mean(0).sum().backward()
            take()
        losses.append(exits.detach().sum())
    assert losses[-1] < losses[0]
    assert step.num_skipped == 0


def test_constants_are_said_once(caplog) -> None:
    class Rounds(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1 * math.sqrt(p.grad.norm()))

    taken = Taken(Rounds)
    with caplog.at_level(logging.WARNING, "reweight"):
        for _ in range(2):
            look_ahead(taken)
    (record,) = caplog.records
    assert "Rounds takes numbers out of tensors" in record.getMessage()


class MovesSomeLater(optim.Optimizer):
    """Entry by entry, and all alike in the first two steps."""

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.num_steps += 1
        for i, p in enumerate(self.param_groups[0]["params"]):
            if self.num_steps < 3 or i > 1:
                p.sub_(p.grad.tanh())


def test_a_step_that_does_something_else_later_is_found() -> None:
    taken = Taken(MovesSomeLater, num_steps=0)
    found = []
    for _ in range(6):
        moved, leaves, _ = look_ahead(taken)
        slopes = torch.autograd.grad(
            sum(new.sum() for new in moved.values()),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        stands = [not slope.any() for slope in slopes]
        right = all(map(torch.equal, moved.values(), taken.step(taken.gradients)))
        found.append((right, stands == [True, True, False, False]))
    assert found[0] == (True, False)
    assert found[2] == (False, False)
    assert found[4:] == [(True, True)] * 2  # looked at again at the fifth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [optim.NAdam, partial(optim.Adam, amsgrad=True), optim.Adadelta])
def test_many_of_one_shape_at_the_first_step(make, dtype: torch.dtype) -> None:
    """Where both ways to take many as one are tried."""
    held = {str(i): nn.Parameter(torch.randn(16, 16, dtype=dtype)) for i in range(7)}
    optimizer = make(list(held.values()))
    leaves = {name: torch.randn_like(p).requires_grad_() for name, p in held.items()}
    moved = pseudo_update([optimizer], held, leaves).parameters
    for name, p in held.items():
        p.grad = leaves[name].detach()
    optimizer.step()
    assert all(torch.equal(moved[name], p) for name, p in held.items())
