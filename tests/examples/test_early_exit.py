"""Early exit against the simulation, which runs the whole net and then chooses."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import early_exit_time
import export
import reweight
from early_exit import answer
from msdnet import MSDNet
from ranet import RANet
from reweight import choose_exits, exit_cross_entropy, exit_shares, find_thresholds
from small import MultiExitConvNet, MultiExitMLP
from staged import StagedNet
from techniques import GradientEquilibrium, InlineCollaboration

SHAPE = (1, 16, 16)
NETS = {
    "mlp": lambda: MultiExitMLP(SHAPE, 5),
    "conv": lambda: MultiExitConvNet(SHAPE, 5, num_exits=4, width=4),
    "msdnet": lambda: MSDNet(5, num_exits=3, in_channels=1, channels=4, growth=4),
    "ranet": lambda: RANet(5, in_channels=1, channels=4, growth=4, num_blocks=1, step=1),
    "with techniques": lambda: InlineCollaboration(
        GradientEquilibrium(MultiExitConvNet(SHAPE, 5, num_exits=4, width=4))
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> StagedNet:
    """A net whose BatchNorm has seen something and whose exits are unsure to various degrees."""
    torch.manual_seed(0)
    net = NETS[name]().to(dtype)
    images = images_of(64, dtype)
    for _ in range(3):
        net(images)
    return net.eval()


def images_of(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of all contrasts, so that confidences are far from each other."""
    return 4 * torch.rand(count, 1, 1, 1, dtype=dtype) * torch.randn(count, *SHAPE, dtype=dtype)


def simulated(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence [N, K] and classes [N, K] of the whole net, in float64."""
    with torch.no_grad():
        logits = [z.double() for z in net(images)]
    classes = torch.stack([z.argmax(1) for z in logits], 1)
    confidence = exit_cross_entropy(logits, classes[:, 0]).confidence
    assert confidence is not None
    return confidence, classes


@pytest.mark.parametrize("power", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("name", NETS)
def test_answers_are_those_of_the_simulation(name: str, power: float) -> None:
    net = make(name)
    held_out, images = images_of(200).chunk(2)
    confidence, classes = simulated(net, images)
    num_exits = confidence.shape[1]
    thresholds = find_thresholds(simulated(net, held_out)[0], exit_shares(num_exits, power))
    expected = choose_exits(confidence, thresholds)
    assert len(expected.unique()) == num_exits, "an exit that nobody takes proves nothing"
    answers = answer(net, images, thresholds)
    assert torch.equal(answers.exits, expected)
    assert torch.equal(answers.classes, classes.gather(1, expected[:, None])[:, 0])
    # Smaller batches are multiplied in another order: some units in the last place.
    expected_confidence = confidence.gather(1, expected[:, None])[:, 0]
    torch.testing.assert_close(answers.confidence, expected_confidence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NETS)
def test_in_single_precision_only_ties_differ(name: str) -> None:
    net = make(name, torch.float32)
    images = images_of(100, torch.float32)
    confidence, classes = simulated(net, images)
    # Thresholds of these very samples, so that some of them lie on one.
    thresholds = find_thresholds(confidence, exit_shares(confidence.shape[1], 1.0))
    expected = choose_exits(confidence, thresholds)
    answers = answer(net, images, thresholds)
    clear = ((confidence - thresholds)[:, :-1].abs() > 1e-6).all(1)
    assert clear.sum() >= len(images) - 3 * len(thresholds)
    assert torch.equal(answers.exits[clear], expected[clear])
    chosen = classes.gather(1, expected[:, None])[:, 0]
    assert torch.equal(answers.classes[clear], chosen[clear])


def test_no_stage_sees_a_sample_that_has_left() -> None:
    net = make("msdnet")
    images = images_of(40)
    confidence, _ = simulated(net, images)
    thresholds = find_thresholds(confidence, exit_shares(3, 1.0))
    sizes: list[int] = []
    for classifier in net.exits:
        classifier.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    exits = answer(net, images, thresholds).exits
    assert sizes == [int((exits >= k).sum()) for k in range(3)]
    sizes.clear()
    never = torch.full((3,), -torch.inf)
    assert answer(net, images, never).exits.tolist() == [0] * 40
    assert sizes == [40]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_batch_of_any_size(batch_size: int) -> None:
    net = make("conv")
    images = images_of(batch_size)
    thresholds = torch.tensor([0.3, 0.4, torch.inf, 5.0])
    answers = answer(net, images, thresholds)
    assert torch.equal(answers.exits, choose_exits(simulated(net, images)[0], thresholds))


def test_what_is_not_finite_leaves_at_the_last_exit() -> None:
    net = make("mlp")
    images = torch.full((2, *SHAPE), torch.nan, dtype=torch.float64)
    assert answer(net, images, torch.full((4,), 0.1)).exits.tolist() == [3, 3]


def test_refusals() -> None:
    net = make("mlp")
    with pytest.raises(ValueError, match=r"thresholds must have shape \[4\], got \[3\]"):
        answer(net, torch.zeros(2, *SHAPE).double(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"inputs must hold a sample, got shape \[0, 1, 16, 16\]"):
        answer(net, torch.zeros(0, *SHAPE).double(), torch.zeros(4))
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        answer(net.train(), torch.zeros(2, *SHAPE).double(), torch.zeros(4))


def test_the_benchmark_measures_what_the_simulation_says() -> None:
    net = make("msdnet")
    images = images_of(60)
    confidence, classes = simulated(net, images)
    target = classes[:, -1].roll(1)
    thresholds = {p: find_thresholds(confidence, exit_shares(3, p)) for p in (0.5, 1.5)}
    whole, *rows = early_exit_time.measure(net, thresholds, images, target, 25, num_rounds=1)
    costs = torch.tensor(reweight.exit_costs(net, images[:1], in_order=True)).double()
    assert float(whole["mean_cost"]) == costs[-1]
    right = (classes[:, -1] == target).double().mean().item()
    assert float(whole["accuracy"]) == pytest.approx(right, abs=5.1e-5)  # written with four digits
    for row, asked in zip(rows, thresholds.values(), strict=True):
        exits = choose_exits(confidence, asked)
        right = (classes.gather(1, exits[:, None])[:, 0] == target).double().mean().item()
        assert row["answers_unlike_the_simulation"] == 0
        assert float(row["mean_cost"]) == pytest.approx(costs[exits].mean().item(), abs=0.51)
        assert float(row["accuracy"]) == pytest.approx(right, abs=5.1e-5)


def test_the_benchmark_counts_answers_unlike_the_simulation(monkeypatch) -> None:
    net, images = make("msdnet"), images_of(30)
    thresholds = {1.0: find_thresholds(simulated(net, images)[0], exit_shares(3, 1.0))}
    exits = answer(net, images, thresholds[1.0]).exits
    monkeypatch.setattr(
        early_exit_time, "answer", lambda net, x, t: answer(net, x, torch.full((3,), -torch.inf))
    )
    _, row = early_exit_time.measure(net, thresholds, images, exits, 30, num_rounds=1)
    assert row["answers_unlike_the_simulation"] == int((exits > 0).sum()) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.export
def test_every_block_of_the_page_runs(tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "early_exit.md").read_text()
    torch.manual_seed(0)
    shape = (1, 16, 16)
    scope = {
        **{name: getattr(reweight, name) for name in reweight.__all__},
        "torch": torch,
        # Small, of two scales: it is traced for each exit.
        "MSDNet": partial(
            MSDNet, channels=4, growth=4, growth_factors=(1, 2), bottleneck_factors=(1, 2)
        ),
        "answer": answer,
        "export_exits": export.export_exits,
        "loader": [(torch.randn(16, *shape), torch.randint(10, (16,)))] * 2,
        "calibration_batch": (torch.randn(40, *shape), torch.randint(10, (40,))),
        "test_images": torch.randn(20, *shape),
        "path": str(tmp_path / "net.pt"),
    }
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, scope)
    expected = choose_exits(simulated(scope["net"], scope["test_images"])[0], scope["thresholds"])
    assert torch.equal(scope["answers"].exits, expected)
    assert len(list(tmp_path.glob("net.pt.exit*.pt2"))) == 3
