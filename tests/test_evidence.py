"""The evidence runner: its arms weigh as they say, it resumes, and its intervals are Student's."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import arms
import evidence
import headroom
import report
from reweight import ExitLosses, exit_cross_entropy

TINY = evidence.Experiment("digits", 3, epochs=2, train_size=64, batch_size=16, width=4)


@pytest.fixture(scope="module")
def exit_losses() -> ExitLosses:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 40, 10, generator=generator)
    return exit_cross_entropy(logits, torch.randint(10, (40,), generator=generator))


@pytest.mark.parametrize("name", [n for n, arm in arms.ARMS.items() if arm.frozen_from is None])
def test_every_arm_takes_steps(name: str) -> None:
    arm = arms.ARMS[name]
    training = evidence.Run(replace(TINY, train_size=32), replace(arm, warm_up=0.0), seed=0)
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    losses, weights, _ = training.train_epoch(0)
    assert losses.losses.shape == weights.shape
    assert len(weights) >= 32
    assert weights.isfinite().all()
    assert all(not torch.equal(before[k], v) for k, v in training.model.named_parameters())
    batches = weights.view(-1, 16, 3)
    if isinstance(training.weighting, arms.SampleReweighter):
        over = {"exits": 2, "samples": 1, "both": (1, 2)}[training.weighting.average_over]
        mean = batches.mean(over)
        if training.weighting.form == "predicted":  # less where a few have all
            assert (mean < 1 + 1e-5).all()
            assert (batches.square().mean(over) < 4 + 1e-4).all()
        else:
            torch.testing.assert_close(mean, torch.ones_like(mean))
    if name == "L2RW":
        assert (weights >= 0).all()
        assert (weights == 0).any()
        sums = batches.sum(1) / 16  # 1, or 0 where no sample helps
        assert ((sums - 1).abs().lt(1e-5) | sums.eq(0)).all()
    if name == "Meta-Weight-Net":
        assert torch.equal(weights, weights[:, :1].expand(-1, 3))
    if name.startswith("greedy"):
        torch.testing.assert_close(weights.mean(1), torch.ones(len(weights)))
        assert weights.amin() >= 1 - 2 * arms.STRENGTH


@pytest.mark.parametrize(
    ("weighting", "means"),
    [
        (arms.uniform, 1),
        (arms.linear, 1),
        (arms.inverse, 1),
        (arms.hard_gates, 1),
        (arms.soft_gates, 1),
        (arms.Uncertainty, 1),
        (arms.hand_designed, 1),
        (arms.focal, 0),
        (arms.selection, 0),
    ],
)
def test_fixed_weights_average_one(weighting, means: int, exit_losses: ExitLosses) -> None:
    weights = weighting(3, 40)(exit_losses)
    mean = weights.mean(means)
    torch.testing.assert_close(mean, torch.ones_like(mean))


def test_linear_and_inverse_are_in_proportion(exit_losses: ExitLosses) -> None:
    for weighting, expected in ((arms.linear, [1, 2, 3]), (arms.inverse, [1, 1 / 2, 1 / 3])):
        weights = weighting(3, 40)(exit_losses)[0]
        torch.testing.assert_close(weights / weights[0], torch.tensor(expected).float())


def test_selection_is_zero_or_one_scale(exit_losses: ExitLosses) -> None:
    weights = arms.selection(3, 40)(exit_losses)
    assert ((weights > 0).sum(1) == 1).all()
    for k in range(3):
        chosen = weights[weights[:, k] > 0, k]
        torch.testing.assert_close(chosen, torch.full_like(chosen, 40 / len(chosen)))


def test_gates_shut_after_an_exit_that_is_right_and_sure() -> None:
    found = ExitLosses(
        torch.tensor([[0.1, 0.1, 0.1]] * 3),
        confidence=torch.tensor([[0.95, 0.1, 0.1], [0.5, 0.99, 0.1], [0.95, 0.95, 0.95]]),
        correct=torch.tensor([[True, True, True], [True, True, True], [False, False, True]]),
    )
    shut = arms.hard_gates(3, 3)(found) < 0.01
    assert shut.tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    soft = arms.soft_gates(3, 3)(found)[0]
    left = 1 - torch.tensor(-0.1).exp()
    expected = torch.stack([left**0, left, left**2]) + 1e-3
    torch.testing.assert_close(soft, expected / expected.mean())


def test_random_thresholds_favour_the_exit_that_is_left_at() -> None:
    """Only the second sample is ever above a threshold, at its second exit; β is at its end."""
    weighting = arms.RandomThresholds(3, 2, beta=2.0)
    weighting.num_steps = weighting.step = 7
    confidence = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.9, 0.1]])
    found = ExitLosses(torch.ones(2, 3), confidence=confidence)
    weights = weighting(found)
    expected = 3 * torch.tensor([[-4.0, -2.0, 0.0], [-2.0, 0.0, -2.0]]).softmax(1)
    torch.testing.assert_close(weights, expected)
    weighting.step = 0
    torch.testing.assert_close(weighting(found), torch.ones(2, 3))


def test_agreement_is_the_share_of_pairs_in_order() -> None:
    weights = torch.tensor([[3.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    wanted = torch.tensor([True, True, False, False])
    assert evidence.agreement(weights, wanted) == 0.5  # of means 2, 0 against 1, 1
    assert evidence.agreement(weights, torch.tensor([True, False, False, True])) == 0.875
    assert np.isnan(evidence.agreement(weights, torch.ones(4, dtype=torch.bool)))


def test_exit_probability_keeps_each_samples_loss(exit_losses: ExitLosses) -> None:
    weights = arms.exit_probability(3, 40)(exit_losses)
    total, weighted = exit_losses.losses.sum(1), (weights * exit_losses.losses).sum(1)
    bounded = weights.sum(1) >= 9 - 1e-4
    torch.testing.assert_close(weighted[~bounded], total[~bounded])
    assert (weighted[bounded] <= total[bounded] + 1e-4).all()
    assert (~bounded).sum() > 20


def test_soft_probabilities_become_the_hard_allotment(exit_losses: ExitLosses) -> None:
    confidence = exit_losses.confidence
    soft = arms.soft_exit_probabilities(confidence)
    torch.testing.assert_close(soft.sum(1), torch.ones(40))
    sharp = arms.soft_exit_probabilities(confidence, temperature=1e-6)
    hard = arms.allot(confidence, arms.exit_shares(3, 0.75)).float()
    # The sample at each threshold passes it with probability 1/2.
    differ = (sharp - hard).abs().amax(1) > 1e-3
    assert differ.sum() <= 2


def test_greedy_descends_by_sign() -> None:
    weighting = arms.greedy(3, 2)
    weighting.descent.data = torch.tensor([[3.0, 0.0, -3.0], [1.0, 1.0, 4.0]])
    with torch.no_grad():
        weights = weighting(ExitLosses(torch.ones(2, 3)))
    expected = 1 + 0.8 * (torch.tensor([[1.0, 0, -1], [-1, -1, 1]]) + torch.tensor([[0], [1 / 3]]))
    torch.testing.assert_close(weights, expected)


def test_uncertainty_finds_the_losses(exit_losses: ExitLosses) -> None:
    """At rest exp(s) is twice the mean loss, so weights are as 1/loss."""
    weighting = arms.Uncertainty(3, 40)
    for _ in range(5000):
        weights = weighting(exit_losses)[0]
    products = weights * exit_losses.losses.mean(0)
    torch.testing.assert_close(products, products.mean().expand(3), rtol=1e-3, atol=0)


def test_gradnorm_descends_on_its_loss() -> None:
    """By automatic differentiation of the paper's loss, through the norms of the gradients."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    images, heads = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((8, 4), (3, 5))
    )
    weighting = arms.GradNorm(3, 8).double()
    weighting.shared = shared

    def losses() -> torch.Tensor:
        return ((images @ shared).tanh() @ heads.T - 1) ** 2

    first = losses().mean(0).detach()
    weighting(ExitLosses(losses()))
    with torch.no_grad():
        shared -= 0.3
    before = weighting.weights.detach().clone().requires_grad_()
    means = losses().mean(0)
    norms = torch.stack(
        [
            torch.autograd.grad(weight * mean, shared, create_graph=True)[0].norm()
            for weight, mean in zip(before, means, strict=True)
        ]
    )
    rates = (means / first).detach()
    wanted = norms.mean().detach() * (rates / rates.mean()) ** 1.5
    (expected,) = torch.autograd.grad((norms - wanted).abs().sum(), before)
    weights = weighting(ExitLosses(losses()))
    torch.testing.assert_close(weighting.weights.grad, expected, rtol=1e-12, atol=0)
    assert (expected > 0).any()
    assert (expected < 0).any()
    torch.testing.assert_close(weights.mean(1), torch.ones(8, dtype=torch.float64))
    assert not torch.equal(weights[0], before)


def test_frozen_learned_starts_from_what_was_learned(monkeypatch) -> None:
    seen = {}
    call = evidence.Run.__call__

    def spy(self, *rest):
        seen[self.arm.learned] = (self, [p.clone() for p in self.weighting.parameters()])
        return call(self, *rest)

    monkeypatch.setattr(evidence.Run, "__call__", spy)
    with evidence.Progress(disable=True) as progress:
        evidence.run(TINY, "frozen learned", 0, progress)
    learned = list(seen[True][0].weighting.parameters())
    for initial, after, frozen in zip(seen[True][1], learned, seen[False][1], strict=True):
        assert not torch.equal(initial, after)
        assert torch.equal(after, frozen)
    assert len(learned) == 4


def test_arms_see_the_same_batches() -> None:
    halves, extra = (
        list(evidence.Run(experiment, arms.ARMS["published"], 3).pairs())
        for experiment in (TINY, replace(TINY, meta="extra"))
    )
    for (ours, meta), (theirs, clean) in zip(halves, extra, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert not torch.equal(meta.images, clean.images)
    assert torch.equal(halves[0][0].images, halves[1][1].images)  # the halves swap roles


def test_a_small_training_set_gets_as_many_steps() -> None:
    arm = arms.Arm(train_on="clean")
    training = evidence.Run(replace(TINY, train_size=700), arm, 0)
    assert len(list(training.pairs())) == 2 * (700 // 32)


def main(path, *names: str) -> list[dict[str, str]]:
    evidence.main(
        ["--experiment", "tiny", "--seeds", "0", "1", "--results", str(path), "--arms", *names]
    )
    with (path / "tiny.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_what_is_missing_and_reports(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(evidence.EXPERIMENTS, "tiny", replace(TINY, label_noise=0.4, meta="extra"))
    first = main(tmp_path, "conventional")
    both = main(tmp_path, "conventional", "sigmoid", "matched compute")
    assert both[:2] == first
    assert [(row["arm"], row["seed"]) for row in both[2:]] == [
        ("sigmoid", "0"),
        ("matched compute", "0"),
        ("sigmoid", "1"),
        ("matched compute", "1"),
    ]
    assert all(None not in row.values() and None not in row for row in both)
    assert float(both[0]["clean weight"]) == float(both[0]["wrong weight"]) == 1
    assert len(both[0]["curve accuracy"].split()) == 39

    report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = tmp_path / "docs" / "results.md"
    page.write_text(page.read_text() + "\nkept\n")
    report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    text = page.read_text()
    assert text.count("<!-- tiny -->") == 1
    assert text.endswith("kept\n")
    mean, reach = report.paired(
        *(
            [float(r["budgeted"]) for r in both if r["arm"] == name]
            for name in ("sigmoid", "conventional")
        )
    )
    assert f"{mean:+.2f} ± {reach:.2f}" in text
    for picture in (tmp_path / "docs" / "results").iterdir():
        assert f"results/{picture.name}" in text


def test_again_is_bitwise_the_same() -> None:
    with evidence.Progress(disable=True) as progress:
        one, two = (evidence.run(TINY, "published", 5, progress) for _ in range(2))
    del one["seconds"], two["seconds"]
    assert repr(one) == repr(two)  # text, for not a number is not itself


def test_fixed_weightings_are_drawn_once_and_weigh_by_loss(exit_losses: ExitLosses) -> None:
    one, again, other = (headroom.FixedWeighting(3, number) for number in (1, 1, 2))
    weights = one(exit_losses)
    torch.testing.assert_close(weights.mean(1), torch.ones(40))
    assert torch.equal(weights, again(exit_losses))
    assert not torch.equal(weights, other(exit_losses))
    # Of the order and the spread of the logarithms alone, so not of the scale of the losses.
    scaled = exit_losses._replace(losses=1e3 * exit_losses.losses + 0.0999)
    torch.testing.assert_close(weights, one(scaled), rtol=0, atol=1e-3)
    assert weights.amin() >= 1 - 2 * arms.STRENGTH


def test_headroom_chooses_by_the_outcome_and_judges_with_fresh_seeds(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(evidence.EXPERIMENTS, "tiny", replace(TINY, epochs=1, train_size=32))
    path, counts = tmp_path / "headroom.csv", []
    for _ in range(2):
        arguments = ["--experiment", "tiny", "--candidates", "16", "--results", str(path)]
        headroom.main(arguments)
        counts.append(path.read_text().count("\n"))
    assert counts[0] == counts[1] == 1 + 17 + 5 * 2 + 4 * 5  # a header, and three rounds
    with path.open(newline="") as file:
        rows = [
            {name: float(row[name]) for name in ("candidate", "seed", "budgeted")}
            for row in csv.DictReader(file)
        ]
    scores = {
        number: [row["budgeted"] for row in rows if row["candidate"] == number and row["seed"] < 3]
        for number in range(1, 17)
    }
    best = sorted((n for n in scores if len(scores[n]) == 3), key=lambda n: -sum(scores[n]))[:3]
    assert {row["candidate"] for row in rows if row["seed"] > 2} == {0, *best}
    base, found = (
        [row["budgeted"] for row in rows if row["candidate"] == n and row["seed"] > 2]
        for n in (0, best[0])
    )
    line = report.headroom(path).splitlines()[-1]
    assert "{:+.2f} ± {:.2f}".format(*report.paired(found, base)) in line
    assert line.startswith("| tiny | 16 | ")


def test_paired_interval_is_students() -> None:
    after, before = np.random.default_rng(0).normal(size=(2, 6))
    interval = stats.ttest_rel(after, before).confidence_interval(0.95)
    mean, reach = report.paired(after, before)
    np.testing.assert_allclose([mean - reach, mean + reach], interval, rtol=1e-12)


def test_area_is_of_fixed_costs() -> None:
    assert evidence.area([0.0, 100.0], [0.0, 100.0], [0, 100]) == pytest.approx(37.5)
    assert evidence.area([100.0, 0.0], [100.0, 0.0], [0, 100]) == pytest.approx(37.5)
