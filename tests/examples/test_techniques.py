"""Training techniques against the formulas they stand for, and inside the meta step."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import SGD

from cases import Fixed, conventional_loss
from msdnet import MSDNet
from ranet import RANet
from reweight import MetaReweightStep, SampleReweighter
from small import MultiExitConvNet, MultiExitMLP
from staged import StagedNet
from techniques import (
    GradientEquilibrium,
    InlineCollaboration,
    OneForAllDistillation,
    scale_gradient,
)

SHAPE = (1, 8, 8)
NUM_CLASSES = 4
NETS: dict[str, Callable[[], StagedNet]] = {
    "mlp": lambda: MultiExitMLP(SHAPE, NUM_CLASSES, num_exits=3, width=5),
    "conv": lambda: MultiExitConvNet(SHAPE, NUM_CLASSES, num_exits=3, width=4),
    "msdnet": lambda: MSDNet(NUM_CLASSES, num_exits=3, in_channels=1, channels=4, growth=4),
    "ranet": lambda: RANet(
        NUM_CLASSES, in_channels=1, channels=4, growth=4, num_blocks=1, block_step=1, step=1
    ),
}


def make(name: str) -> StagedNet:
    torch.manual_seed(0)
    return NETS[name]().double()


def make_batch(seed: int, num_samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    conventional_loss(model(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # by the first forward mode of a process
def test_scaling_changes_the_gradient_in_every_mode_and_nothing_else() -> None:
    x = torch.randn(50, dtype=torch.float32, requires_grad=True)
    direction = torch.randn(50)
    assert torch.equal(scale_gradient(x, 1 / 3), x)
    (backward,) = torch.autograd.grad((scale_gradient(x, 0.25) * direction).sum(), x)
    assert torch.equal(backward, 0.25 * direction)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), direction)
        tangent = forward_ad.unpack_dual(scale_gradient(dual, 0.25)).tangent
    assert torch.equal(tangent, 0.25 * direction)


@pytest.mark.parametrize("name", NETS)
def test_equilibrium_leaves_answers_and_names(name: str) -> None:
    net, (images, _) = make(name), make_batch(0)
    wrapped = GradientEquilibrium(copy.deepcopy(net))
    assert all(map(torch.equal, wrapped(images), net(images)))
    assert list(wrapped.state_dict()) == [f"net.{key}" for key in net.state_dict()]


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_every_block_of_a_chain_gets_the_share_of_each_exit_that_was_promised(name: str) -> None:
    """Block j: Σ_{k≥j} 1/(K−k) · Π_{j≤i<k} (K−i−1)/(K−i) of exit k's gradient: 1/(K−j) each."""
    net, batch = make(name), make_batch(0)
    num_exits = len(net.exits)
    of_each_exit = []
    for k in range(num_exits):
        net.zero_grad()
        F.cross_entropy(net(batch[0])[k], batch[1]).backward()
        of_each_exit.append(
            {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        )
    found = gradients(GradientEquilibrium(net), batch)
    for parameter in dict(net.named_parameters()):
        kind, number = parameter.split(".")[:2]
        expected = sum(each[parameter] for each in of_each_exit if parameter in each)
        if kind == "blocks":
            expected = expected / (num_exits - int(number))
        # One product in another place: rounding alone, of sums over batch and image.
        torch.testing.assert_close(found[f"net.{parameter}"], expected, rtol=1e-10, atol=1e-14)


def test_equilibrium_of_msdnet_scales_the_coarsest_scale_alone() -> None:
    """As published; against the net with the factors written between its blocks."""
    net, batch = make("msdnet"), make_batch(0)
    found = gradients(GradientEquilibrium(net), batch)

    def rescaled(x: Tensor, factor: float) -> Tensor:
        return x * factor + (x * (1 - factor)).detach()

    features, logits, num_exits = batch[0], [], 3
    for k in range(num_exits):
        features = net.blocks[k](features)
        features[-1] = rescaled(features[-1], 1 / (num_exits - k))
        logits.append(net.exits[k](features[-1]))
        features[-1] = rescaled(features[-1], num_exits - k - 1)
    net.zero_grad()
    conventional_loss(logits, batch[1]).backward()
    for parameter, value in net.named_parameters():
        if value.grad is None:  # of finer scales that no exit reads
            assert f"net.{parameter}" not in found
        else:
            scale = value.grad.abs().max()
            assert (found[f"net.{parameter}"] - value.grad).abs().max() <= 1e-11 * scale


@pytest.mark.parametrize("name", NETS)
def test_collaboration_is_what_its_formula_says(name: str) -> None:
    net, (images, _) = make(name), make_batch(0)
    read: list[Tensor] = []
    for exit in net.exits:
        last = exit[-1] if isinstance(exit, nn.Sequential) else exit
        last.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    net(images)
    collaboration = InlineCollaboration(net).double()
    expected = [read[0] @ collaboration.exits[0].weight.T + collaboration.exits[0].bias]
    for k in range(1, len(net.exits)):
        linear, norm, _ = collaboration.links[k - 1]
        hidden = expected[-1] @ linear.weight.T + linear.bias
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
        both = torch.cat([read[k], hidden.clamp(min=0)], 1)
        expected.append(both @ collaboration.exits[k].weight.T + collaboration.exits[k].bias)
    for logits, by_hand in zip(collaboration(images), expected, strict=True):
        torch.testing.assert_close(logits, by_hand, rtol=1e-10, atol=1e-12)


def test_a_late_exit_teaches_the_early_ones_through_the_links() -> None:
    model, batch = InlineCollaboration(make("mlp")).double(), make_batch(0)
    F.cross_entropy(model(batch[0])[-1], batch[1]).backward()
    assert model.exits[0].weight.grad is not None
    assert model.exits[0].weight.grad.abs().sum() > 0


def test_collaboration_needs_a_linear_layer() -> None:
    net = make("mlp")
    net.exits[1] = nn.Sequential(nn.Linear(5, NUM_CLASSES), nn.ReLU())
    with pytest.raises(TypeError, match="exit 1 must end in a linear layer, got ReLU"):
        InlineCollaboration(net)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize(("gamma", "temperature"), [(0.1, 1.0), (0.9, 3.0), (1.0, 2.0), (0.0, 1.0)])
def test_distillation_is_what_its_formula_says(
    gamma: float, temperature: float, with_teacher: bool
) -> None:
    logits = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    target = torch.randint(4, (5,))
    teacher = torch.randn(5, 4, dtype=torch.float64) if with_teacher else None
    found = OneForAllDistillation(gamma, temperature)(logits, target, teacher)
    soft = (logits[-1] if teacher is None else teacher).tolist()
    for i in range(5):
        for k in range(3):
            row = logits[k][i].tolist()

            def probabilities(z: list[float], t: float) -> list[float]:
                total = sum(math.exp(each / t) for each in z)
                return [math.exp(each / t) / total for each in z]

            expected = -math.log(probabilities(row, 1)[int(target[i])])
            if k < 2:
                q, p = probabilities(row, temperature), probabilities(soft[i], temperature)
                divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                expected = (1 - gamma) * expected + gamma * temperature**2 * divergence
            assert found.losses[i, k].item() == pytest.approx(expected, rel=1e-12)
            assert found.confidence[i, k].item() == pytest.approx(max(probabilities(row, 1)))
    (slope,) = torch.autograd.grad(found.losses[:, :2].sum(), logits[-1], allow_unused=True)
    assert slope is None or not slope.any(), "the teacher learns nothing"


def test_distillation_of_one_exit_is_cross_entropy() -> None:
    logits, target = torch.randn(5, 4), torch.randint(4, (5,))
    losses = OneForAllDistillation(gamma=0.9)([logits], target).losses
    torch.testing.assert_close(losses[:, 0], F.cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"), ({"temperature": 0}, "must be positive")],
)
def test_distillation_refuses(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneForAllDistillation(**wrong)


TECHNIQUES: dict[str, Callable[[StagedNet], StagedNet]] = {
    "equilibrium": GradientEquilibrium,
    "collaboration": InlineCollaboration,
    "distillation": lambda net: net,
    "all": lambda net: InlineCollaboration(GradientEquilibrium(net)),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", NETS)
def test_hypergradient_equals_double_backward(name: str, technique: str) -> None:
    model = TECHNIQUES[technique](make(name)).double()
    options = (
        {"loss": OneForAllDistillation(gamma=0.4, temperature=2.0)}
        if technique in ("distillation", "all")
        else {}
    )
    train, meta = make_batch(1), make_batch(2, num_samples=7)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(2):
        optimizer.zero_grad()
        conventional_loss(model(train[0]), train[1]).backward()
        optimizer.step()
    found = {}
    for estimator in ("forward", "unrolled"):
        torch.manual_seed(3)
        weights = 1 + torch.rand(6, 3, dtype=torch.float64)
        recording = Fixed(weights)
        MetaReweightStep(
            model,
            optimizer,
            recording,
            reweighter_optimizer=SGD(recording.parameters(), lr=1.0),
            estimator=estimator,
            **options,
        ).update_reweighter(train, meta)
        found[estimator] = weights - recording.weights.detach()
    scale = found["unrolled"].norm()
    assert scale > 1e-6
    assert (found["forward"] - found["unrolled"]).norm() < 1e-10 * scale


def test_frozen_net_and_distillation_as_published_train_in_both_ways() -> None:
    """The second training: exits alone, BatchNorm of the frozen net in evaluation mode."""
    net, batch, meta = make("conv"), make_batch(1, 20), make_batch(2, 20)
    model = InlineCollaboration(net).double()
    net.requires_grad_(False)
    model.train()
    net.eval()
    before = copy.deepcopy(net.state_dict())
    exits_before = model.exits[0].weight.detach().clone()
    step = MetaReweightStep(
        model,
        SGD((p for p in model.parameters() if p.requires_grad), lr=0.1),
        SampleReweighter(3).double(),
        loss=OneForAllDistillation(),
    )
    first, *_, last = [step(batch, meta) for _ in range(20)]
    assert last.train_loss < first.train_loss
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not torch.equal(exits_before, model.exits[0].weight)
