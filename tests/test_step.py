"""The order of events: what a step changes, what it leaves alone, and what it refuses."""

import copy
import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from cases import (
    EXITS,
    MODELS,
    NUM_CLASSES,
    OPTIMIZERS,
    make_batch,
    make_model,
    warmed,
)
from properties import assert_same
from reweight import (
    BudgetedObjective,
    ExitLosses,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
    swap_halves,
)


def make(model_name="mlp", optimizer_name="sgd", num_exits=3, warm=True, **options):
    make_optimizer, num_steps = OPTIMIZERS[optimizer_name], 3 if warm else 0
    model, optimizer = warmed(model_name, make_optimizer, num_exits, num_steps=num_steps)
    reweighter = options.pop("reweighter", None) or SampleReweighter(num_exits, num_hidden=5)
    return MetaReweightStep(model, optimizer, reweighter.double(), **options)


def batches(model_name="mlp"):
    return make_batch(model_name, seed=1), make_batch(model_name, num_samples=9, seed=2)


def snapshot(step: MetaReweightStep) -> dict[str, object]:
    """Everything of the user's, as bytes: two snapshots are equal only bitwise."""
    buffer = io.BytesIO()
    torch.save(
        {
            "model": step.model.state_dict(),
            "buffers": [b.clone() for b in step.model.buffers()],
            "grad": [p.grad for p in step.model.parameters()],
            "optimizer": step.optimizers[0].state_dict(),
            "random": torch.get_rng_state(),
            "modes": [module.training for module in step.model.modules()],
            "python": random.getstate(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "fused attention": torch.backends.cuda.flash_sdp_enabled(),
        },
        buffer,
    )
    return buffer.getvalue()


def add_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_update_reweighter_touches_nothing_else(model_name, optimizer_name, estimator) -> None:
    step = make(model_name, optimizer_name, estimator=estimator)
    add_gradients(step.model)
    weights_before = [p.detach().clone() for p in step.reweighter.parameters()]
    before = snapshot(step)
    step.update_reweighter(*batches(model_name))
    assert snapshot(step) == before
    moved = [
        not torch.equal(a, b)
        for a, b in zip(weights_before, step.reweighter.parameters(), strict=True)
    ]
    assert any(moved)
    assert all(p.grad is None for p in step.reweighter.parameters())


# Not the transformer unrolled: double backward takes unfused attention, which rounds otherwise.
@pytest.mark.parametrize(
    ("model_name", "estimator"),
    [(name, "forward") for name in MODELS]
    + [(name, "unrolled") for name in MODELS if name != "transformer_dropout"],
)
@pytest.mark.parametrize("num_exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_training_with_weights_of_one_is_conventional_bitwise(
    model_name, estimator, optimizer_name, num_exits
) -> None:
    """Over two steps, so that buffers, optimizer state and random state count as well."""
    ones = SampleReweighter(num_exits, strength=0, form="tanh", average_over="both")
    step = make(model_name, optimizer_name, num_exits, reweighter=ones, estimator=estimator)
    model, optimizer = copy.deepcopy((step.model, step.optimizers[0]))
    train, meta = batches(model_name)

    def run(backward: Callable[[], object], moved: torch.optim.Optimizer) -> None:
        torch.manual_seed(5)
        for _ in range(2):
            moved.zero_grad()
            backward()
            moved.step()

    run(lambda: step.backward(train, meta), step.optimizers[0])
    after = torch.get_rng_state()
    run(
        lambda: exit_cross_entropy(model(train[0]), train[1]).losses.mean(0).sum().backward(),
        optimizer,
    )
    assert torch.equal(after, torch.get_rng_state())
    for (name, ours), theirs in zip(
        step.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        assert ours.grad is theirs.grad is None or torch.equal(ours.grad, theirs.grad)


def test_backward_adds_the_weighted_gradient() -> None:
    step = make()
    train, meta = batches()
    add_gradients(step.model)
    result = step.backward(train, meta)
    logits = step.model(train[0])
    losses = torch.stack([F.cross_entropy(z, train[1], reduction="none") for z in logits], 1)
    expected = (result.weights * losses).mean(0).sum()
    assert result.train_loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, gradient in zip(
        step.model.parameters(),
        torch.autograd.grad(expected, list(step.model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(parameter.grad, 0.5 + gradient, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(result.weights, step.reweighter(result.losses))
        given = [t for t in result.losses if t is not None]
        assert not any(t.requires_grad for t in (*given, *result[1:4]))


def test_call_is_zero_grad_backward_and_step() -> None:
    step = make(optimizer_name="adam")
    twin = copy.deepcopy(step)
    train, meta = batches()
    add_gradients(step.model)
    step(train, meta)
    twin.optimizers[0].zero_grad()
    twin.backward(train, meta)
    twin.optimizers[0].step()
    for ours, theirs in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_interval_counts_calls() -> None:
    step = make(interval=3)
    train, meta = batches()
    updated = [step.backward(train, meta).meta_loss is not None for _ in range(7)]
    assert updated == [True, False, False, True, False, False, True]


def test_descends_on_the_meta_loss() -> None:
    """Eighty updates of the reweighter alone: the loss after the step goes down."""
    step = make(objective=MeanObjective())
    step.reweighter_optimizer.param_groups[0]["lr"] = 1e-2
    train, meta = batches()
    values = [step.update_reweighter(train, meta).meta_loss.item() for _ in range(80)]
    assert values[-1] < values[0] - 1e-3
    assert sum(b < a for a, b in pairwise(values)) > 60


def test_single_exit_is_meta_weight_net() -> None:
    """One step written as in the paper: v(l)/mean, plain SGD look-ahead, clean meta batch."""
    step = make(num_exits=1, optimizer_name="sgd", objective=MeanObjective())
    train, meta = batches()
    network = copy.deepcopy(step.reweighter.network)
    adam = AdamW(network.parameters(), lr=1e-3, eps=1e-16, weight_decay=1e-4)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in step.model.named_parameters()}

    def losses_at(parameters, batch):
        (logits,) = torch.func.functional_call(step.model, parameters, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none").unsqueeze(1)

    losses = losses_at(parameters, train)
    raw = network(losses.detach()).sigmoid()
    loss = (raw / raw.mean() * losses).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    ahead = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    losses_at(ahead, meta).mean().backward()
    adam.step()

    step.update_reweighter(train, meta)
    for ours, theirs in zip(
        step.reweighter.network.parameters(), network.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class TokenModel(nn.Module):
    """A language model with two exits, as [B, T, C] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.gru, self.heads = (
            nn.GRU(6, 6, batch_first=True),
            nn.ModuleList([nn.Linear(6, 11), nn.Linear(6, 11)]),
        )

    def forward(self, tokens, scale=1.0):
        early = self.embedding(tokens) * scale
        late, _ = self.gru(early)
        return [head(x) for head, x in zip(self.heads, (early, late), strict=True)]


def token_batches(ignored: bool):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (2, 4, 5), generator=generator)
    targets = torch.randint(11, (2, 4, 5), generator=generator)
    if ignored:
        targets[:, :, -2:] = -100
    return (tokens[0], targets[0]), (tokens[1], targets[1])


def test_tokens_are_samples_and_ignored_ones_drop_out() -> None:
    """Ignoring the last two tokens of a causal model equals cutting them off."""
    torch.manual_seed(0)
    model = TokenModel().double()
    full = MetaReweightStep(
        model, SGD(model.parameters(), lr=0.1), SampleReweighter(2, average_over="both").double()
    )
    cut = copy.deepcopy(full)
    train, meta = token_batches(ignored=True)
    result = full.backward(train, meta)
    shorter = cut.backward(*((x[:, :3], y[:, :3]) for x, y in (train, meta)))
    assert result.losses.losses.shape == (20, 2)
    torch.testing.assert_close(result.meta_loss, shorter.meta_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.exit_shares, shorter.exit_shares)
    for ours, theirs in zip(
        [*full.model.parameters(), *full.reweighter.parameters()],
        [*cut.model.parameters(), *cut.reweighter.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_all_samples_ignored_changes_nothing_and_says_nothing_false() -> None:
    model = TokenModel()
    step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(2))
    train, meta = token_batches(ignored=False)
    nothing = torch.full_like(train[1], -100)
    result = step.backward((train[0], nothing), (meta[0], nothing))
    assert result.train_loss == 0
    assert not result.nonfinite.any()
    assert all((p.grad == 0).all() for p in model.parameters())


@dataclass
class Output:
    logits: list[torch.Tensor]


@pytest.mark.parametrize("form", ["list", "tuple", "stacked", "dict", "dataclass", "wrapped_loss"])
def test_outputs_of_every_form_give_the_same_step(form: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("mlp")

        def forward(self, x):
            logits = self.inner(x)
            forms = {"tuple": tuple(logits), "stacked": torch.stack(logits)}
            forms |= {"dict": {"logits": logits}, "dataclass": Output(logits)}
            return forms.get(form, logits)

    options = {
        "dict": {"exits": lambda outputs: outputs["logits"]},
        "dataclass": {"exits": lambda outputs: outputs.logits},
    }.get(form, {})
    if form == "wrapped_loss":
        options = {
            "objective": MeanObjective(),
            "loss": lambda logits, target: exit_cross_entropy(logits, target).losses,
        }
    model, expected = Wrapped(), make(warm=False, objective=options.get("objective"))
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        copy.deepcopy(expected.reweighter),
        **options,
    )
    train, meta = batches()
    ours, theirs = step.backward(train, meta), expected.backward(train, meta)
    torch.testing.assert_close(ours.hypergradient_norm, theirs.hypergradient_norm)
    torch.testing.assert_close(ours.weights, theirs.weights)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_may_be_several(form: str) -> None:
    torch.manual_seed(0)
    model = TokenModel()
    step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(2))
    scale = torch.full((4, 1, 1), 2.0)
    (train, target), _ = token_batches(ignored=False)
    inputs = (train, scale) if form == "tuple" else {"tokens": train, "scale": scale}
    for halves in swap_halves([(inputs, target)]):
        result = step.backward(*halves)
    expected = exit_cross_entropy(model(train, scale), target).losses[10:]
    torch.testing.assert_close(result.losses.losses, expected)


class TestNonFinite:
    @pytest.mark.parametrize("where", ["train", "meta"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
    def test_never_reaches_the_reweighter(self, where: str, bad: float) -> None:
        step = make(optimizer_name="adam")
        train, meta = batches()
        step.backward(train, meta)
        before = copy.deepcopy(step.state_dict())
        spoiled = {"train": train, "meta": meta}[where]
        spoiled[0][3] = bad
        result = step.backward(train, meta)
        # The meta loss is computed at what the train losses made of the parameters.
        assert result.nonfinite.tolist() == [where == "train", True, True, False]
        assert re.search("not updated: non-finite (train losses|meta loss)", result.summary())
        assert step.num_skipped == 1
        for key in ("reweighter", "reweighter_optimizer"):
            assert_same(step.state_dict()[key], before[key])

    def test_one_exit_is_enough_to_skip(self) -> None:
        step = make()
        train, meta = batches()
        before = copy.deepcopy(step.state_dict()["reweighter"])
        with torch.no_grad():
            step.model.exits[1].bias[0] = torch.nan
        assert step.update_reweighter(train, meta).nonfinite[0]
        assert_same(step.state_dict()["reweighter"], before)

    def test_learning_goes_on_afterwards(self) -> None:
        step = make()
        train, meta = batches()
        poisoned = (torch.full_like(train[0], torch.nan), train[1])
        step.update_reweighter(poisoned, meta)
        before = [p.detach().clone() for p in step.reweighter.parameters()]
        assert not step.update_reweighter(train, meta).nonfinite.any()
        after = list(step.reweighter.parameters())
        assert not all(map(torch.equal, before, after))
        assert all(p.isfinite().all() for p in after)

    @pytest.mark.parametrize("inputs", ["confidences", "both"])
    def test_samples_that_do_not_count_may_come_to_no_number(self, inputs: str) -> None:
        model = nn.Linear(4, 3)
        train, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
        train[1][2] = meta[1][2] = -100

        def exits(logits: Tensor) -> list[Tensor]:
            return [logits.masked_fill((train[1] == -100).unsqueeze(1), -torch.inf)] * 2

        reweighter = SampleReweighter(2, inputs=inputs)
        step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), reweighter, exits=exits)
        for _ in range(2):
            assert not step(train, meta).nonfinite.any()
        for parameter in (*model.parameters(), *reweighter.parameters()):
            assert parameter.isfinite().all()

    @pytest.mark.parametrize("num_before", [0, 1])
    def test_a_step_of_the_reweighter_to_no_number_is_taken_back(self, num_before: int) -> None:
        step = make()
        train, meta = batches()
        for _ in range(num_before):
            step.update_reweighter(train, meta)
        before = copy.deepcopy(step.state_dict())
        own = step.reweighter_optimizer.param_groups[0]
        lr, own["lr"] = own["lr"], torch.inf
        result = step.update_reweighter(train, meta)
        own["lr"] = lr
        assert result.nonfinite.tolist() == [False, False, False, True]
        assert result.summary().endswith("reweighter not updated: non-finite reweighter")
        assert step.num_skipped == 1
        assert_same(step.state_dict()["reweighter"], before["reweighter"])
        assert not step.update_reweighter(train, meta).nonfinite.any()


class TestState:
    def test_goes_through_a_file_and_resumes_bitwise(self) -> None:
        step = make(optimizer_name="adamw", interval=2)
        train, meta = batches()
        for _ in range(3):
            step(train, meta)
        buffer = io.BytesIO()
        saved = (step.state_dict(), step.model.state_dict(), step.optimizers[0].state_dict())
        torch.save(saved, buffer)
        resumed = make(optimizer_name="adamw", interval=2, warm=False)
        buffer.seek(0)
        state, model_state, optimizer_state = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(state)
        resumed.model.load_state_dict(model_state)
        resumed.optimizers[0].load_state_dict(optimizer_state)
        for _ in range(3):
            step(train, meta)
            resumed(train, meta)
        for ours, theirs in zip(
            [*step.model.parameters(), *step.reweighter.parameters()],
            [*resumed.model.parameters(), *resumed.reweighter.parameters()],
            strict=True,
        ):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda state: state.pop("num_calls"), "must have the keys"),
            (
                lambda state: state.update(reweighter_options=repr(SampleReweighter(2))),
                "must be of this reweighter",
            ),
            (
                lambda state: state["reweighter_optimizer"]["param_groups"].clear(),
                "must be of this reweighter and optimizer",
            ),
        ],
    )
    def test_refuses_another_state_and_loads_nothing(self, spoil, message) -> None:
        step = make()
        before = copy.deepcopy(step.state_dict())
        state = copy.deepcopy(make(warm=False).state_dict())
        spoil(state)
        with pytest.raises(ValueError, match=message):
            step.load_state_dict(state)
        assert_same(step.state_dict(), before)


class TestReweighter:
    """What the reweighter and its optimizer may be."""

    def test_gradients_left_from_the_users_own_backward_play_no_part(self) -> None:
        step, twin = make(), make()
        train, meta = batches()
        losses = exit_cross_entropy(step.model(train[0]), train[1])
        (step.reweighter(losses) * losses.losses).mean(0).sum().backward()
        step.update_reweighter(train, meta)
        twin.update_reweighter(train, meta)
        assert_same(list(step.reweighter.parameters()), list(twin.reweighter.parameters()))

    def test_no_gradient_goes_through_it_whatever_it_does(self) -> None:
        class Careless(SampleReweighter):
            def forward(self, losses: ExitLosses) -> torch.Tensor:
                return 1 + 0 * super().forward(losses) + losses.losses + losses.confidence

        def with_graph(logits, target) -> ExitLosses:
            losses = exit_cross_entropy(logits, target)
            confidence = torch.stack([z.softmax(1).amax(1) for z in logits], 1)
            return losses._replace(confidence=confidence)

        step = make(reweighter=Careless(3), loss=with_graph)
        before = snapshot(step)
        step.update_reweighter(*batches())
        assert snapshot(step) == before
        result = step.backward(*batches())
        assert not result.losses.confidence.requires_grad

    @pytest.mark.parametrize(
        "make_optimizer",
        [
            torch.optim.NAdam,
            torch.optim.ASGD,
            torch.optim.Rprop,
            lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        ],
    )
    def test_a_first_update_that_is_skipped_leaves_its_optimizer_fresh(self, make_optimizer):
        step = make()
        twin = copy.deepcopy(step)
        for one in (step, twin):
            one._learner.optimizer = make_optimizer(one.reweighter.parameters())
        train, meta = batches()
        step.update_reweighter((torch.full_like(train[0], torch.nan), train[1]), meta)
        for one in (step, twin):
            for _ in range(3):
                one.update_reweighter(train, meta)
        assert_same(list(step.reweighter.parameters()), list(twin.reweighter.parameters()))

    @pytest.mark.parametrize("spoil", ["missing", "shape", "optimizer"])
    def test_a_broken_checkpoint_loads_nothing(self, spoil: str) -> None:
        step, other = make(), make()
        other.update_reweighter(*batches())
        state, before = copy.deepcopy(other.state_dict()), copy.deepcopy(step.state_dict())
        if spoil == "missing":
            del state["reweighter"]["network.0.bias"]
        elif spoil == "shape":
            state["reweighter"]["network.2.bias"] = torch.zeros(7)
        else:
            sgd = SGD(other.reweighter.parameters(), lr=0.1)
            state["reweighter_optimizer"] = sgd.state_dict()
        with pytest.raises(ValueError, match="must be of this reweighter and optimizer"):
            step.load_state_dict(state)
        assert_same(step.state_dict(), before)

    def test_a_frozen_one_just_weights(self) -> None:
        step = make(reweighter=SampleReweighter(3).requires_grad_(False))
        result = step.backward(*batches())
        assert result.meta_loss is None
        assert torch.equal(result.weights, step.reweighter(result.losses))
        with pytest.raises(ValueError, match="trainable parameter"):
            step.update_reweighter(*batches())

    def test_any_module_from_losses_to_weights_will_do(self) -> None:
        class ByDepth(nn.Module):
            def forward(self, losses: ExitLosses) -> torch.Tensor:
                return torch.arange(1.0, 4.0).expand_as(losses.losses)

        step = make(reweighter=ByDepth())
        assert step.backward(*batches()).weights[0].tolist() == [1.0, 2.0, 3.0]
        assert step.state_dict()["reweighter_optimizer"] is None

    def test_weights_of_another_shape_are_named(self) -> None:
        class PerSample(nn.Module):
            def forward(self, losses: ExitLosses) -> torch.Tensor:
                return losses.losses.mean(1)

        with pytest.raises(ValueError, match=r"shape of the losses, \[7, 3\], got \[7\]"):
            make(reweighter=PerSample()).backward(*batches())

    def test_an_optimizer_of_something_else_is_refused(self) -> None:
        model = make_model("mlp")
        for optimizer in (SGD(model.parameters(), lr=0.1), Adam(SampleReweighter(3).parameters())):
            with pytest.raises(ValueError, match="parameters of `reweighter` alone"):
                make(reweighter_optimizer=optimizer)

    def test_one_with_other_choices_is_not_loaded(self) -> None:
        state = make(reweighter=SampleReweighter(3, strength=0.3)).state_dict()
        with pytest.raises(ValueError, match="must be of this reweighter"):
            make(reweighter=SampleReweighter(3, strength=0.8)).load_state_dict(state)


def test_a_failure_in_the_last_backward_changes_nothing_either() -> None:
    name = "blocks.0.0.weight"  # which does not move, for else its hook would be refused
    step = make("conv_batch_norm", "adam", moves=lambda parameter: parameter != name)
    train, meta = batches("conv_batch_norm")
    step.backward(train, meta)
    step.optimizers[0].zero_grad()
    before, state = snapshot(step), copy.deepcopy(step.state_dict())

    def fail(parameter: torch.Tensor) -> None:
        raise RuntimeError("hook")

    parameter = step.model.get_parameter(name)
    handle = parameter.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RuntimeError, match="hook"):
        step.backward(train, meta)
    handle.remove()
    assert snapshot(step) == before
    assert_same(step.state_dict()["reweighter"], state["reweighter"])
    assert_same(step.state_dict()["reweighter_optimizer"], state["reweighter_optimizer"])


def test_a_buffer_that_the_forward_assigns_comes_back_when_a_call_fails() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, NUM_CLASSES)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return self.layer(x)

    model = Counts().double()
    step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(1).double())
    train, meta = batches()
    buffer = model.count
    with pytest.raises(ValueError, match="`target`"):
        step.backward(train, (meta[0], meta[1] + NUM_CLASSES))
    assert model.count is buffer
    assert model.count == 0
    step.backward(train, meta)
    assert model.count == 1


class TestCold:
    def test_first_step_of_adam_is_no_mistake(self) -> None:
        step = make(optimizer_name="adam", warm=False)
        for _ in range(2):
            step(*batches())

    def test_forgetting_the_optimizer_is_one(self) -> None:
        step = make(optimizer_name="adam", warm=False)
        step.backward(*batches())
        step.optimizers[0].zero_grad()
        with pytest.warns(UserWarning, match="Adam still has no state.*Call optimizer.step"):
            step.backward(*batches())


class Unexpected(nn.Module):
    def __init__(self, output) -> None:
        super().__init__()
        self.layer, self.norm, self.output = nn.Linear(6, 6), nn.BatchNorm1d(6), output

    def forward(self, x):
        return self.output(self.norm(self.layer(x)))


def with_target(batch, target):
    return batch[0], target


BAD_CALLS = {
    "target out of range": (
        {},
        lambda t, m: (with_target(t, t[1] + NUM_CLASSES), m),
        ValueError,
        "`target` must lie in 0..3",
    ),
    "meta target out of range": (
        {},
        lambda t, m: (t, with_target(m, m[1] + NUM_CLASSES)),
        ValueError,
        "`target` must lie in 0..3",
    ),
    "another number of exits": (
        {"reweighter": SampleReweighter(2)},
        lambda t, m: (t, m),
        ValueError,
        r"num_exits=2\], got \[7, 3\]",
    ),
    "another number of exits, no update due": (
        {"reweighter": SampleReweighter(2), "interval": 2},
        lambda t, m: (t, m),
        ValueError,
        r"num_exits=2\], got \[7, 3\]",
    ),
    "empty batch": (
        {},
        lambda t, m: ((t[0][:0], t[1][:0]), m),
        ValueError,
        "`train` must hold at least one sample",
    ),
    "empty meta batch": (
        {},
        lambda t, m: (t, (m[0][:0], m[1][:0])),
        ValueError,
        "`meta` must hold at least one sample",
    ),
    "no pair": ({}, lambda t, m: (t[0], m), TypeError, "`train` must be a pair"),
    "no meta pair": ({}, lambda t, m: (t, None), TypeError, "`meta` must be a pair.*None"),
    "loss already averaged": (
        {"loss": lambda z, y: exit_cross_entropy(z, y).losses.mean()},
        lambda t, m: (t, m),
        ValueError,
        "Do not average over the samples",
    ),
    "loss of another type": (
        {"loss": lambda z, y: [1.0]},
        lambda t, m: (t, m),
        TypeError,
        "`loss` must return ExitLosses",
    ),
    "losses without confidences": (
        {"loss": lambda z, y: exit_cross_entropy(z, y).losses, "objective": BudgetedObjective()},
        lambda t, m: (t, m),
        ValueError,
        "use MeanObjective",
    ),
    "losses cut from the graph": (
        {"loss": lambda z, y: ExitLosses(exit_cross_entropy(z, y).losses.detach())},
        lambda t, m: (t, m),
        ValueError,
        "without a graph",
    ),
}


@pytest.mark.parametrize("method", ["backward", "__call__", "update_reweighter"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named_and_change_nothing(case: str, method: str) -> None:
    options, spoil, error, message = BAD_CALLS[case]
    options = dict(options)
    if "reweighter" in options:
        options["reweighter"] = copy.deepcopy(options["reweighter"])
    step = make("conv_batch_norm", "adam", **options)
    if options.get("interval") == 2:
        step._learner.num_calls = 1
    add_gradients(step.model)
    before, state = snapshot(step), copy.deepcopy(step.state_dict())
    with pytest.raises(error, match=message):
        getattr(step, method)(*spoil(*batches("conv_batch_norm")))
    assert snapshot(step) == before
    assert_same(step.state_dict(), state)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda z: {"logits": z}, TypeError, r"got a dict\(.*Pass `exits="),
        (lambda z: "logits", TypeError, "got str"),
        (lambda z: [z, z.sum()], ValueError, "exit 2"),
        (lambda z: [z.detach(), z.detach()], ValueError, "without a graph"),
    ],
)
def test_unexpected_outputs_are_named_and_change_nothing(output, error, message) -> None:
    model = Unexpected(output).double()
    step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(2).double())
    before = snapshot(step)
    with pytest.raises(error, match=message):
        step.backward(*batches())
    assert snapshot(step) == before


def test_optimizer_of_parameters_that_no_loss_depends_on() -> None:
    model = make_model("mlp")
    model.unused = nn.Linear(2, 2)
    step = MetaReweightStep(model, SGD(model.unused.parameters(), lr=0.1), SampleReweighter(3))
    with pytest.raises(ValueError, match="must hold a parameter that the losses depend on"):
        step.backward(*batches())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"interval": 0}, ValueError, "`interval` must be at least 1, got 0"),
        ({"estimator": "exact"}, ValueError, "`estimator` must be one of auto, forward"),
    ],
)
def test_bad_options_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_optimizer_of_another_model_is_named() -> None:
    model, other = make_model("mlp"), make_model("mlp")
    with pytest.raises(ValueError, match=r"holds none of them.*after moving the model"):
        MetaReweightStep(model, SGD(other.parameters(), lr=0.1), SampleReweighter(3))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(3))


def test_unknown_optimizer_is_named() -> None:
    model = make_model("mlp")
    step = MetaReweightStep(model, torch.optim.Rprop(model.parameters()), SampleReweighter(3))
    with pytest.raises(TypeError, match="got Rprop: its step follows the signs"):
        step.backward(make_batch("mlp"), make_batch("mlp", seed=2))
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(TypeError, match="got str"):
        MetaReweightStep(model, "sgd", SampleReweighter(3))
