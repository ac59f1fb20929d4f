"""The loops that users have: low precision, accumulation, clipping, several optimizers."""

import copy
import gc
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import Fixed, conventional_loss, make_batch, make_model, warm_up
from properties import assert_same
from reweight import (
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)


def parts(dtype=torch.float64, optimizer=None):
    model = make_model("conv_batch_norm").to(dtype)
    train, meta = (
        (x.to(dtype), y) for x, y in (make_batch("conv_batch_norm", 8, seed) for seed in (1, 2))
    )
    chosen = (optimizer or partial(Adam, lr=0.01))(model.parameters())
    warm_up(model, chosen, train)
    return model, chosen, train, meta


def recording(model, optimizer, weights: Tensor, **options) -> MetaReweightStep:
    """A step whose reweighter has the hypergradient subtracted from its weights."""
    fixed = Fixed(weights)
    return MetaReweightStep(
        model,
        optimizer,
        fixed,
        reweighter_optimizer=SGD(fixed.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    )


def hypergradient_of(step: MetaReweightStep, weights: Tensor) -> Tensor:
    return weights - step.reweighter.weights.detach()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("estimator", "least"), [("forward", 0.99), ("unrolled", 0.99), ("finite_difference", 0.9)]
    )
    def test_autocast_leaves_losses_and_hypergradient_in_float32(
        self, estimator: str, least: float, dtype
    ) -> None:
        model, optimizer, train, meta = parts(torch.float32)
        weights = torch.rand(8, 3) + 0.5
        exact = recording(*copy.deepcopy((model, optimizer)), weights)
        exact.backward(train, meta)
        step = recording(model, optimizer, weights, estimator=estimator)
        with torch.autocast("cpu", dtype):
            result = step.backward(train, meta)
        assert result.losses.losses.dtype == result.weights.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        ours, theirs = hypergradient_of(step, weights), hypergradient_of(exact, weights)
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > least

    @pytest.mark.parametrize("estimator", ["forward", "unrolled", "finite_difference"])
    def test_grad_scaler_scales_the_gradient_and_nothing_else(self, estimator: str) -> None:
        model, optimizer, train, meta = parts(torch.float32)
        plain_model, plain_optimizer = copy.deepcopy((model, optimizer))
        weights = torch.rand(8, 3) + 0.5
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plain = recording(plain_model, plain_optimizer, weights, estimator=estimator)
        step = recording(model, optimizer, weights, estimator=estimator, scaler=scaler)
        plain.backward(train, meta)
        step.backward(train, meta)
        for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad * 2**10, rtol=1e-5, atol=1e-6)
        ours, theirs = hypergradient_of(step, weights), hypergradient_of(plain, weights)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
        assert scaler.get_scale() == 2.0**10
        scaler.step(optimizer)
        scaler.update()
        with pytest.raises(ValueError, match=r"call step.backward, scaler.step"):
            step(train, meta)

    def test_gradients_that_underflow_in_float16_come_through_with_a_scaler(self) -> None:
        """Weights of 1e-7: below what float16 holds, and so are the gradients inside the model."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        train, meta = ((x.float(), y) for x, y in (make_batch("mlp"), make_batch("mlp", 9, 2)))
        gradients = []
        for precise, scaler in (
            (True, None),
            (False, None),
            (False, torch.amp.GradScaler("cpu", init_scale=2.0**16)),
        ):
            twin = copy.deepcopy(model)
            options = {"objective": MeanObjective(), "scaler": scaler}
            weights = Fixed(torch.full((7, 1), 1e-7)).requires_grad_(False)
            step = MetaReweightStep(twin, SGD(twin.parameters(), lr=0.1), weights, **options)
            with torch.autocast("cpu", torch.float16, enabled=not precise):
                step.backward(train, meta)
            gradients.append(twin[0].weight.grad / (1 if scaler is None else scaler.get_scale()))
        exact, lost, found = gradients
        assert (found - exact).norm() < 0.01 * exact.norm()
        assert (lost - exact).norm() > 0.1 * exact.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_whole_models_in_any_dtype(self, dtype) -> None:
        model, optimizer, train, meta = parts(dtype)
        step = MetaReweightStep(model, optimizer, SampleReweighter(3))
        result = step(train, meta)
        assert result.losses.losses.dtype == torch.float32
        assert not result.nonfinite.any()
        assert {p.dtype for p in model.parameters()} == {dtype}


class TestAccumulation:
    def test_scaled_calls_add_up_to_the_gradient_of_the_joined_batch(self) -> None:
        model = make_model("mlp")
        x, y = make_batch("mlp", 8)
        meta = make_batch("mlp", seed=2)
        for first in (slice(0, 4), slice(4, 8)):
            step = MetaReweightStep(
                model, SGD(model.parameters(), lr=0.1), SampleReweighter(3, strength=0)
            )
            step.backward((x[first], y[first]), meta, scale=0.5)
        expected = torch.autograd.grad(conventional_loss(model(x), y), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_the_look_ahead_is_the_step_that_is_taken(self, clip: float | None) -> None:
        """With what is accumulated, and clipped: against differences of the real thing."""
        model, optimizer, train, meta = parts(optimizer=partial(SGD, lr=0.1, momentum=0.9))
        accumulated = {n: torch.randn_like(p) * 0.01 for n, p in model.named_parameters()}
        weights = torch.rand(8, 3, dtype=torch.float64) + 0.5
        direction = torch.randn(8, 3, dtype=torch.float64)

        def objective(weights: Tensor) -> float:
            twin, moved = copy.deepcopy((model, optimizer))
            logits = twin(train[0])
            losses = [F.cross_entropy(z, train[1], reduction="none") for z in logits]
            (0.25 * weights * torch.stack(losses, 1)).mean(0).sum().backward()
            for name, parameter in twin.named_parameters():
                parameter.grad += accumulated[name]
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(twin.parameters(), clip)
                assert norm > clip, "else nothing is clipped"
            moved.step()
            with torch.no_grad():
                return conventional_loss(twin(meta[0]), meta[1]).item()

        slope = (
            objective(weights + 1e-5 * direction) - objective(weights - 1e-5 * direction)
        ) / 2e-5
        for name, parameter in model.named_parameters():
            parameter.grad = accumulated[name].clone()
        step = recording(model, optimizer, weights, clip_grad_norm=clip)
        step.backward(train, meta, scale=0.25)
        found = (hypergradient_of(step, weights) * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-4)

    def test_accumulating_on_a_fresh_adam_is_no_mistake(self) -> None:
        model = make_model("mlp")
        step = MetaReweightStep(model, Adam(model.parameters()), SampleReweighter(3))
        for _ in range(3):
            step.backward(make_batch("mlp"), make_batch("mlp", seed=2), scale=1 / 3)


def test_call_clips_as_it_looks_ahead() -> None:
    model, optimizer, train, meta = parts(optimizer=partial(SGD, lr=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    MetaReweightStep(model, optimizer, SampleReweighter(3), clip_grad_norm=1e-3)(train, meta)
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    norm = torch.stack([m.norm() for m in moved]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_exploding_hypergradients_can_be_clipped() -> None:
    model, optimizer, train, meta = parts()
    weights = torch.rand(8, 3, dtype=torch.float64) + 0.5
    free = recording(*copy.deepcopy((model, optimizer)), weights)
    free.update_reweighter(train, meta)
    norm = hypergradient_of(free, weights).norm().item()
    for limit in (norm / 3, norm * 3):
        step = recording(*copy.deepcopy((model, optimizer)), weights, clip_hypergradient=limit)
        result = step.update_reweighter(train, meta)
        assert hypergradient_of(step, weights).norm().item() == pytest.approx(min(norm, limit))
        assert result.hypergradient_norm.item() == pytest.approx(norm)


def test_average_and_scheduler_go_on_as_ever() -> None:
    model, optimizer, train, meta = parts()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    step = MetaReweightStep(model, optimizer, SampleReweighter(3))
    losses = []
    for _ in range(10):
        losses.append(step(train, meta).train_loss.item())
        scheduler.step()
        average.update_parameters(model)
    assert losses[-1] < losses[0]
    assert average.n_averaged == 10


def test_several_optimizers_over_one_model() -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizers = [
        SGD(model.blocks.parameters(), lr=0.1, momentum=0.9),
        AdamW(model.exits.parameters(), lr=0.01),
    ]
    before = [p.detach().clone() for p in model.parameters()]
    step = MetaReweightStep(model, optimizers, SampleReweighter(3))
    step(train, meta)
    step(train, meta)
    assert not any(map(torch.equal, before, model.parameters()))


class TestSizes:
    @pytest.mark.parametrize("num_exits", [1, 64])
    def test_any_number_of_exits(self, num_exits: int) -> None:
        class Stack(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(6, 4 * num_exits)

            def forward(self, x):
                return self.head(x).view(len(x), num_exits, 4).transpose(0, 1)

        model = Stack().double()
        step = MetaReweightStep(
            model, SGD(model.parameters(), lr=0.1), SampleReweighter(num_exits, num_hidden=5)
        )
        result = step(make_batch("mlp"), make_batch("mlp", 30, seed=2))
        assert result.weights.shape == (7, num_exits)
        assert result.exit_shares.sum().item() == pytest.approx(1)

    def test_a_million_weights(self) -> None:
        head = nn.Linear(2, 3 * 20)

        class Stack(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = head

            def forward(self, x):
                return self.head(x).view(len(x), 20, 3).transpose(0, 1)

        model = Stack()
        step = MetaReweightStep(
            model, SGD(model.parameters(), lr=0.1), SampleReweighter(20, num_hidden=4)
        )
        batch = (torch.randn(50_000, 2), torch.randint(3, (50_000,)))
        result = step(batch, batch)
        assert result.weights.numel() == 10**6
        assert not result.nonfinite.any()

    @pytest.mark.parametrize("num_exits", [1, 3])
    def test_a_batch_of_one_against_a_meta_batch_of_many(self, num_exits: int) -> None:
        model = make_model("mlp", num_exits)
        step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(num_exits))
        result = step(make_batch("mlp", 1), make_batch("mlp", 20, seed=2))
        assert result.weights.shape == (1, num_exits)
        assert not result.nonfinite.any()


class TestState:
    def test_copies_and_pickles(self) -> None:
        model, optimizer, train, meta = parts()
        step = MetaReweightStep(model, optimizer, SampleReweighter(3))
        step(train, meta)
        twins = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
        expected = step(train, meta)
        for twin in twins:
            assert_same(tuple(twin(train, meta).weights), tuple(expected.weights))
            assert_same(twin.model.state_dict(), step.model.state_dict())

    def test_a_truncated_file_loads_nothing(self) -> None:
        model, optimizer, _, _ = parts()
        step = MetaReweightStep(model, optimizer, SampleReweighter(3))
        buffer = io.BytesIO()
        torch.save(step.state_dict(), buffer)
        with pytest.raises((RuntimeError, ValueError)):
            torch.load(io.BytesIO(buffer.getvalue()[:-200]), weights_only=True)

    @pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is")
    def test_goes_through_distributed_checkpoint(self, tmp_path) -> None:
        checkpoint = pytest.importorskip("torch.distributed.checkpoint")
        model, optimizer, train, meta = parts()
        step = MetaReweightStep(model, optimizer, SampleReweighter(3))
        step(train, meta)
        state = step.state_dict()
        checkpoint.save({"step": state}, checkpoint_id=tmp_path)
        other = MetaReweightStep(model, optimizer, SampleReweighter(3))
        other(train, meta)
        loaded = {"step": other.state_dict()}
        checkpoint.load(loaded, checkpoint_id=tmp_path)
        other.load_state_dict(loaded["step"])
        assert_same(other.state_dict(), state)

    def test_the_reweighter_goes_through_safetensors(self, tmp_path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        reweighter, other = SampleReweighter(3), SampleReweighter(3)
        safetensors.save_model(reweighter, tmp_path / "reweighter.safetensors")
        safetensors.load_model(other, tmp_path / "reweighter.safetensors")
        losses = torch.rand(4, 3)
        assert torch.equal(reweighter(losses), other(losses))


@pytest.mark.parametrize(
    ("estimator", "num_steps"), [("forward", 100), ("unrolled", 20), ("finite_difference", 20)]
)
def test_steps_leave_no_tensor_behind(estimator: str, num_steps: int) -> None:
    model, train, meta = make_model("mlp"), make_batch("mlp"), make_batch("mlp", seed=2)
    optimizer = Adam(model.parameters(), lr=1e-4)
    step = MetaReweightStep(model, optimizer, SampleReweighter(3), estimator=estimator)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for _ in range(3):
        step(train, meta)
    before = count()
    for _ in range(num_steps):
        step(train, meta)
    assert count() <= before


def test_custom_losses_need_no_confidences() -> None:
    """Regression, one loss for each of three exits: anything of shape [B, K] will do."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def squared(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target.unsqueeze(1)).square()

    step = MetaReweightStep(
        model,
        Adam(model.parameters(), lr=0.01),
        SampleReweighter(3),
        loss=squared,
        objective=MeanObjective(),
    )
    x = torch.randn(32, 6)
    y = x.sum(1)
    values = [step((x[:16], y[:16]), (x[16:], y[16:])).train_loss.item() for _ in range(60)]
    assert values[-1] < 0.5 * values[0]


def test_losses_are_those_of_the_first_forward() -> None:
    model, optimizer, train, meta = parts()
    expected = exit_cross_entropy(copy.deepcopy(model)(train[0]), train[1])
    step = MetaReweightStep(model, optimizer, SampleReweighter(3))
    assert_same(tuple(step.backward(train, meta).losses)[:1], (expected.losses.detach(),))
