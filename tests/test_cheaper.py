"""Cheaper steps: each gives something up, and nothing else."""

import copy

import pytest
import torch
from torch.optim import SGD, AdamW

import cases
from cases import EXITS, OPTIMIZERS, make_batch, warmed
from model_rows import ROWS, UNCOMPILED, set_up
from properties import assert_same, outcome
from reweight import MetaReweightStep, SampleReweighter

MODELS = ["mlp", "conv_batch_norm"]


def make(model_name: str = "mlp", optimizer_class=AdamW, **options) -> MetaReweightStep:
    model, optimizer = warmed(
        model_name, lambda model: optimizer_class(model.parameters(), lr=0.05), seed=7
    )
    reweighter = SampleReweighter(3, num_hidden=4).double()
    own = torch.optim.SGD(reweighter.parameters(), lr=1.0)
    return MetaReweightStep(model, optimizer, reweighter, reweighter_optimizer=own, **options)


def batches(model_name: str = "mlp"):
    return make_batch(model_name), make_batch(model_name, seed=2)


def vector(module: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
@pytest.mark.parametrize("model_name", MODELS)
def test_a_lagged_step_trains_first_and_learns_the_same(model_name, optimizer_class, lean) -> None:
    exact = make(model_name, optimizer_class)
    lagged = make(model_name, optimizer_class, lagged=True, lean=lean)
    train, meta = batches(model_name)
    before = copy.deepcopy(exact.reweighter)
    one, other = exact.backward(train, meta), lagged.backward(train, meta)
    # The reweighter learns bitwise the same, from the weights that it gave before.
    assert torch.equal(vector(exact.reweighter), vector(lagged.reweighter))
    assert torch.equal(one.hypergradient_norm, other.hypergradient_norm)
    with torch.no_grad():
        assert torch.equal(other.weights, before(one.losses))
    # And the gradient is that of those weights.
    model = make(model_name, optimizer_class).model
    frozen = MetaReweightStep(
        model, SGD(model.parameters()), before.requires_grad_(False), loss=lagged._forward._loss
    )
    frozen.backward(train, meta)
    for ours, theirs in zip(lagged.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(lagged.model.buffers(), exact.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
@pytest.mark.parametrize("model_name", MODELS)
def test_the_next_train_batch_can_be_the_meta_batch(model_name, optimizer_class, lean) -> None:
    """What is learned is bitwise what a lagged step learns with that batch as meta batch."""
    train, following = batches(model_name)
    given = make(model_name, optimizer_class, lagged=True)
    shared = make(model_name, optimizer_class, lagged=True, lean=lean)
    before = copy.deepcopy(given.reweighter)
    one = given.backward(train, following)
    assert shared.backward(train).meta_loss is None
    assert torch.equal(vector(shared.reweighter), vector(before))
    for ours, theirs in zip(shared.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    shared.optimizers[0].step()
    shared.optimizers[0].zero_grad(set_to_none=False)
    other = shared.backward(following)
    # The look-ahead and the real step round the new parameters apart.
    torch.testing.assert_close(
        vector(given.reweighter), vector(shared.reweighter), rtol=1e-10, atol=1e-13
    )
    torch.testing.assert_close(one.hypergradient_norm, other.hypergradient_norm, rtol=1e-10, atol=0)
    torch.testing.assert_close(one.meta_loss, other.meta_loss, rtol=1e-12, atol=0)
    # And the batch that judged is trained on with the new weights.
    with torch.no_grad():
        assert torch.equal(other.weights, shared.reweighter(other.losses))
    model = copy.deepcopy(shared.model)
    model.zero_grad()
    frozen = MetaReweightStep(
        model,
        SGD(model.parameters()),
        copy.deepcopy(shared.reweighter).requires_grad_(False),
        loss=shared._forward._loss,
    )
    frozen.backward(following, train)
    for ours, theirs in zip(shared.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_a_meta_batch_between_forgets_what_waits() -> None:
    step = make(lagged=True)
    train, other = batches()
    step(train)
    assert step(train, other).meta_loss is not None
    assert step(train).meta_loss is None
    assert step(other).meta_loss is not None


def test_a_call_that_fails_keeps_what_waits() -> None:
    step = make(lagged=True)
    train, other = batches()
    step(train)
    before, waiting = vector(step.reweighter), step._lookahead.waiting
    with pytest.raises(ValueError, match="`target` must lie in"):
        step((other[0], other[1] + 100))
    assert torch.equal(before, vector(step.reweighter))
    assert step._lookahead.waiting is waiting


def test_a_call_that_fails_after_what_waited_was_judged_can_be_repeated(monkeypatch) -> None:
    train, other = batches()
    learnt = []
    for fails in (False, True):
        step = make(lagged=True, clip_grad_norm=1.0)
        step(train)
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(step._lookahead, "scaled", lambda _: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    step.backward(other)
        step.backward(other)
        learnt.append(vector(step.reweighter))
    assert torch.equal(*learnt)


def test_what_waits_is_given_up_where_it_has_lost_its_meaning() -> None:
    train, other = batches()
    step = make(lagged=True)
    saved = copy.deepcopy(step.state_dict())
    step(train)
    assert copy.deepcopy(step)(other).meta_loss is None  # a copy has a model of its own
    step.load_state_dict(saved)
    assert step(other).meta_loss is None
    next(step.model.parameters()).requires_grad_(False)
    assert step(train).meta_loss is None
    assert step(other).meta_loss is not None


def test_only_a_lagged_step_does_without_a_meta_batch() -> None:
    with pytest.raises(TypeError, match=r"`meta` must be a pair .* unless lagged=True"):
        make().backward(make_batch("mlp"))


def test_a_lagged_step_accumulates() -> None:
    exact, lagged = make(), make(lagged=True)
    (train, meta), more = batches(), make_batch("mlp", seed=4)
    for step in (exact, lagged):
        step.reweighter.requires_grad_(False)
        step.backward(more, meta, scale=0.5)
        step.reweighter.requires_grad_()
        step.backward(train, meta, scale=0.5)
    assert torch.equal(vector(exact.reweighter), vector(lagged.reweighter))


def test_a_lagged_step_that_fails_changes_nothing() -> None:
    step = make(lagged=True)
    train, meta = batches()
    step.backward(train, meta)
    gradients = [p.grad.clone() for p in step.model.parameters()]
    before, calls = vector(step.reweighter), step.state_dict()["num_calls"]
    with pytest.raises(ValueError, match="`target` must lie in"):
        step.backward(train, (meta[0], meta[1] + 100))
    assert all(map(torch.equal, gradients, (p.grad for p in step.model.parameters())))
    assert torch.equal(before, vector(step.reweighter))
    assert calls == step.state_dict()["num_calls"]


def change(step: MetaReweightStep, train, meta) -> torch.Tensor:
    """What one update moves the reweighter by: with SGD of lr 1, minus its gradient."""
    before = vector(step.reweighter)
    step.update_reweighter(train, meta)
    after = vector(step.reweighter)
    torch.nn.utils.vector_to_parameters(before, step.reweighter.parameters())
    return after - before


def test_a_fraction_of_the_rows_is_unbiased() -> None:
    """The mean over all draws of one row of eight, each as often, is what all rows give."""
    train, meta = batches()
    size = len(train[1])
    exact = change(make(), train, meta)
    step = make(train_fraction=1 / size)
    by_row, seed = {}, 0
    while len(by_row) < size:
        step._learner.num_updates = seed = seed + 1
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[0].item()
        by_row.setdefault(drawn, change(step, train, meta))
    estimates = torch.stack(list(by_row.values()))
    torch.testing.assert_close(estimates.mean(0), exact, rtol=1e-9, atol=1e-12)
    assert estimates.std(0).max() > 0.1 * exact.abs().max()  # and noisy


def test_tokens_of_a_row_stay_together() -> None:
    """A language model's batch has fewer rows than losses."""

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 4)
            self.exits = torch.nn.ModuleList(torch.nn.Linear(4, 5) for _ in range(3))

        def forward(self, tokens):
            x = self.embedding(tokens)
            return [head(x) for head in self.exits]

    torch.manual_seed(1)
    model = Tokens().double()
    train, meta = [(torch.randint(5, (4, 3)), torch.randint(5, (4, 3))) for _ in range(2)]
    optimizer = SGD(model.parameters(), lr=0.1)
    reweighter = SampleReweighter(3, num_hidden=4).double()
    own = SGD(reweighter.parameters(), lr=1.0)
    options = {"reweighter_optimizer": own}
    exact = change(MetaReweightStep(model, optimizer, reweighter, **options), train, meta)
    step = MetaReweightStep(model, optimizer, reweighter, train_fraction=0.25, **options)
    by_row, seed = {}, 0
    while len(by_row) < 4:
        step._learner.num_updates = seed = seed + 1
        drawn = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[0].item()
        by_row.setdefault(drawn, change(step, train, meta))
    mean = torch.stack(list(by_row.values())).mean(0)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-12)


def test_rows_are_drawn_anew_at_each_update() -> None:
    step = make(train_fraction=0.5)
    train, meta = batches()
    changes = [change(step, train, meta) for _ in range(4)]
    assert not all(torch.equal(changes[0], each) for each in changes[1:])


def test_rows_are_drawn_apart_from_all_else_that_is_random() -> None:
    step = make(train_fraction=0.5)
    train, meta = batches()
    before = torch.get_rng_state()
    step.backward(train, meta)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("estimator", ["forward", "finite_difference"])
def test_a_choice_of_parameters_is_a_step_of_those_alone(estimator) -> None:
    """As if an optimizer held no others."""
    train, meta = batches()
    step = make(optimizer_class=SGD, moves=lambda name: "exits" in name, estimator=estimator)
    alone = make(optimizer_class=SGD, estimator=estimator)
    alone._lookahead.optimizers = (SGD(alone.model.exits.parameters(), lr=0.05),)
    torch.testing.assert_close(
        change(step, train, meta), change(alone, train, meta), rtol=1e-9, atol=1e-12
    )
    step.backward(train, meta)
    assert all(p.grad is not None for p in step.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_fraction": 0.0}, r"`train_fraction` must lie in \(0, 1\]"),
        ({"train_fraction": 1.5}, r"`train_fraction` must lie in \(0, 1\]"),
        ({"lagged": True, "estimator": "unrolled"}, "cannot be 'unrolled'"),
        ({"train_fraction": 0.5, "estimator": "unrolled"}, "cannot be 'unrolled'"),
        ({"moves": lambda name: False}, "`moves` must choose a parameter"),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("num_exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", cases.MODELS)
def test_lean_steps_are_the_same_steps(model_name, optimizer_name, num_exits) -> None:
    """Bitwise: gradients, parameters, buffers, reweighter, results, random state."""
    train, meta = make_batch(model_name, seed=1), make_batch(model_name, num_samples=9, seed=2)
    ends = []
    for lean in (False, True):
        model, optimizer = warmed(model_name, OPTIMIZERS[optimizer_name], num_exits)
        reweighter = SampleReweighter(num_exits, num_hidden=3).double()
        step = MetaReweightStep(model, optimizer, reweighter, lean=lean)
        results = [step(train, meta) for _ in range(2)]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        kept = [*model.parameters(), *model.buffers(), *reweighter.parameters()]
        found = [
            t for r in results for t in (r.losses.losses, r.weights, r.train_loss, r.meta_loss)
        ]
        ends.append([*gradients, *kept, *found, torch.get_rng_state()])
    assert_same(*ends)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize("name", UNCOMPILED)
def test_lean_steps_are_the_same_for_every_model(name: str) -> None:
    model, _, train, meta = set_up(ROWS[name])
    assert_same(outcome(model, train, meta, lean=True), outcome(model, train, meta))
