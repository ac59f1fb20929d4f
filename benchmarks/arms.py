"""The arms of the evidence: what weights the losses of a run get, and what learns them.

A weighting takes the :class:`reweight.ExitLosses` of a batch to weights [B, K]; an arm is a
weighting with the options of its training. All weights average 1 over the exits or the samples,
unless the rule itself says otherwise, so that arms differ in how they share out one learning rate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reweight import (
    BudgetedObjective,
    DirectWeights,
    ExitLosses,
    MeanObjective,
    MetaLoss,
    SampleReweighter,
    exit_shares,
    find_thresholds,
)
from reweight.objectives import allot

Weighting = Callable[[ExitLosses], Tensor]
STRENGTH = 0.8  # as published for CIFAR


def soft_exit_probabilities(
    confidence: Tensor, power: float = 0.75, temperature: float = 1.0
) -> Tensor:
    """How likely each sample leaves at each exit, [B, K], were the thresholds a little uncertain.

    Thresholds are those of the batch for shares q_k ∝ p^k. A sample passes one with the probability
    sigmoid((logit c − logit T) / temperature), the logit of a confidence being log c/(1 − c).
    """
    thresholds = find_thresholds(confidence, exit_shares(confidence.shape[1], power))
    thresholds[-1] = -torch.inf
    logits = confidence.logit(eps=1e-6)
    leaves = ((logits - thresholds.logit(eps=1e-6)) / temperature).sigmoid()
    leaves[:, thresholds == torch.inf] = 0
    leaves[:, -1] = 1
    stays = (1 - leaves).cumprod(1)
    return leaves * torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1]], 1)


@dataclass(frozen=True)
class SoftObjective:
    """L_meta by soft exit probabilities P: Σ_k mean of l[·,k] weighted by P[·,k].

    Args:
        powers: p of the shares. With several, the loss of the answer is averaged over samples and
            over p instead, K · mean_p mean_i Σ_k P[i,k]·l[i,k]: the budgeted curve's own area.
        temperature: of :func:`soft_exit_probabilities`.
    """

    powers: tuple[float, ...] = (0.75,)
    temperature: float = 1.0

    def __call__(self, meta: ExitLosses) -> MetaLoss:
        """See :class:`reweight.objectives.Objective`."""
        assert meta.confidence is not None
        probabilities = [
            soft_exit_probabilities(meta.confidence, power, self.temperature)
            for power in self.powers
        ]
        shares = torch.stack(probabilities).mean((0, 1))
        if len(probabilities) == 1:
            value = ((probabilities[0] * meta.losses).mean(0) / shares.clamp(min=1e-12)).sum()
        else:
            mean = torch.stack(probabilities).mean(0)
            value = meta.losses.shape[1] * (mean * meta.losses).sum(1).mean()
        return MetaLoss(value, shares)


AREA = SoftObjective(powers=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75))


def uniform(num_exits: int, batch_size: int) -> Weighting:
    """Conventional training: every weight 1."""
    return lambda exit_losses: torch.ones_like(exit_losses.losses)


def linear(num_exits: int, batch_size: int) -> Weighting:
    """Exit k of K gets a weight in proportion to k."""
    return _by_exit(torch.arange(1.0, num_exits + 1))


def inverse(num_exits: int, batch_size: int) -> Weighting:
    """Exit k of K gets a weight in proportion to 1/k."""
    return _by_exit(1 / torch.arange(1.0, num_exits + 1))


def _by_exit(values: Tensor) -> Weighting:
    values = values / values.mean()
    return lambda exit_losses: values.expand_as(exit_losses.losses)


def focal(num_exits: int, batch_size: int) -> Weighting:
    """(1 − p_target)², its mean over the batch 1 at each exit (focal loss's factor, γ = 2)."""

    def weigh(exit_losses: ExitLosses) -> Tensor:
        factor = (1 - (-exit_losses.losses).exp()) ** 2
        return factor / factor.mean(0).clamp(min=1e-12)

    return weigh


def exit_probability(num_exits: int, batch_size: int) -> Weighting:
    """JEI-DNN's P·ΣL/Σ(P·L): a sample counts where it will leave, its total loss unchanged.

    JEI-DNN's P comes of learned gates; here it is :func:`soft_exit_probabilities`.
    """

    def weigh(exit_losses: ExitLosses) -> Tensor:
        assert exit_losses.confidence is not None
        probabilities = soft_exit_probabilities(exit_losses.confidence)
        weighted = (probabilities * exit_losses.losses).sum(1, keepdim=True)
        total = exit_losses.losses.sum(1, keepdim=True)
        # Σ(P·L) can be far below ΣL; a bound keeps a single sample from making the step.
        scale = (total / weighted.clamp(min=1e-12)).clamp(max=num_exits**2)
        return probabilities * scale

    return weigh


def selection(num_exits: int, batch_size: int) -> Weighting:
    """Each exit trains on the samples allotted to it alone, and on their mean: 0 or B/|S_k|."""

    def weigh(exit_losses: ExitLosses) -> Tensor:
        members = _members(exit_losses)
        return members / members.mean(0).clamp(min=1 / len(members))

    return weigh


def hand_designed(num_exits: int, batch_size: int) -> Weighting:
    """The allotted exit of a sample gets 1 + 0.8·(1 − 1/K), its others 1 − 0.8/K."""
    return lambda exit_losses: 1 + STRENGTH * (_members(exit_losses) - 1 / num_exits)


def _members(exit_losses: ExitLosses) -> Tensor:
    assert exit_losses.confidence is not None
    shares = exit_shares(exit_losses.losses.shape[1], 0.75)
    return allot(exit_losses.confidence, shares).to(exit_losses.losses)


def hard_gates(num_exits: int, batch_size: int, threshold: float = 0.9) -> Weighting:
    """CGT (Mokssit et al., 2025): an exit trains on what none before it gets right and is sure of.

    Sure is a confidence of at least the threshold.
    """

    def weigh(exit_losses: ExitLosses) -> Tensor:
        assert exit_losses.confidence is not None
        assert exit_losses.correct is not None
        done = exit_losses.correct.bool() & (exit_losses.confidence >= threshold)
        return _gates(1 - done.to(exit_losses.losses))

    return weigh


def soft_gates(num_exits: int, batch_size: int) -> Weighting:
    """CGT's other form: an exit trains on what all before it leave of the label's probability."""
    return lambda exit_losses: _gates(1 - (-exit_losses.losses).exp())


def _gates(missed: Tensor) -> Tensor:
    """By the product of what the exits before missed, never quite 0, mean 1 over the exits."""
    before = torch.cat([torch.ones_like(missed[:, :1]), missed[:, :-1]], 1)
    gates = before.cumprod(1) + 1e-3
    return gates / gates.mean(1, keepdim=True)


class RandomThresholds(nn.Module):
    """COSEE (He et al., AAAI 2025): a sample counts most at the exit where it would leave.

    Five thresholds are drawn between the smallest and the largest confidence of the batch. For each
    a sample's weights go with exp(−β·distance to its exit), mean 1 over the exits, β growing evenly
    from 0 to ``beta``. COSEE's calibration loss is left out, and its signal is the confidence.
    """

    num_steps: int  # of the training; the runner sets it

    def __init__(self, num_exits: int, batch_size: int, beta: float = 1.0) -> None:
        super().__init__()
        places = torch.arange(num_exits)
        self.distances = (places - places.unsqueeze(1)).abs()
        self.beta, self.step = beta, 0

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K]."""
        confidence = exit_losses.confidence
        assert confidence is not None
        beta = self.beta * self.step / self.num_steps
        self.step += 1
        by_exit = len(self.distances) * (-beta * self.distances).softmax(1)
        thresholds = torch.empty(5, 1, 1).uniform_(confidence.min().item(), confidence.max().item())
        leaves = confidence > thresholds
        leaves[..., -1] = True
        return by_exit[leaves.int().argmax(-1)].mean(0)


class Uncertainty(nn.Module):
    """exp(−s_k), mean 1 over the exits, with Σ exp(−s_k)·L_k + s_k/2 descended on in s.

    Kendall et al. (CVPR 2018) for K classification losses. One step of lr 0.01 at each batch.
    """

    def __init__(self, num_exits: int, batch_size: int) -> None:
        super().__init__()
        self.s: Tensor
        self.register_buffer("s", torch.zeros(num_exits))

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K]; moves s."""
        self.s += 0.01 * ((-self.s).exp() * exit_losses.losses.detach().mean(0) - 0.5)
        weights = (-self.s).exp()
        return (weights / weights.mean()).expand_as(exit_losses.losses)


class GradNorm(nn.Module):
    """Weights whose exits move ``shared`` at like rates (Chen et al., ICML 2018), mean 1.

    With n_k = ‖∂L_k/∂shared‖ and r_k the loss over its first value, mean 1 over the exits, the
    weights descend on Σ_k |w_k·n_k − mean(w·n)·r_k^1.5|, the second term held fixed. One step of
    Adam of lr 0.025 at each batch.
    """

    shared: Tensor  # the last parameter that all exits have in common; the runner sets it

    def __init__(self, num_exits: int, batch_size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_exits))
        self.optimizer = torch.optim.Adam([self.weights], 0.025)
        self.first: Tensor | None = None

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K]; moves them. The losses carry the graph of their batch, and keep it."""
        means = exit_losses.losses.detach().mean(0)
        if self.first is None:
            self.first = means
        with torch.enable_grad():
            gradients = [
                torch.autograd.grad(losses.mean(), self.shared, retain_graph=True)[0]
                for losses in exit_losses.losses.unbind(1)
            ]
        with torch.no_grad():
            norms = torch.stack([gradient.norm() for gradient in gradients])
            rates = means / self.first
            actual = self.weights * norms
            wanted = actual.mean() * (rates / rates.mean()) ** 1.5
            self.weights.grad = norms * (actual - wanted).sign()
            self.optimizer.step()
            self.weights.clamp_(min=1e-3)
            self.weights /= self.weights.mean()
        return self.weights.detach().clone().expand_as(exit_losses.losses)


class FreeWeights(nn.Module):
    """A weight of its own for every entry of the batch, made of the hypergradient at once.

    Learned by SGD of lr 1 from ``base``, what it holds after an update is −∂L_meta/∂w. While
    gradients are recorded it returns the base; without, ``form`` of what it holds.
    """

    def __init__(
        self, num_exits: int, batch_size: int, base: float, form: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.descent = nn.Parameter(torch.zeros(batch_size, num_exits))
        self.base, self.form = base, form

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K]."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.descent.zero_()
            return self.base + self.descent
        return self.form(self.descent)


def l2rw(num_exits: int, batch_size: int) -> nn.Module:
    """Ren et al. (ICML 2018): max(0, −∂L_meta/∂w at w = 0), mean 1 over the batch at each exit."""

    def form(descent: Tensor) -> Tensor:
        positive = descent.clamp(min=0)
        return positive / positive.mean(0).clamp(min=1e-30)

    return FreeWeights(num_exits, batch_size, 0.0, form)


def greedy(num_exits: int, batch_size: int) -> nn.Module:
    """The weights 1 ± 0.8 (about the sample's mean) that lower the meta loss of the step most.

    No function of the losses: every weight goes as far as the tanh form lets it, by the sign of its
    own derivative. What reweighting by one step's foresight can do at all.
    """

    def form(descent: Tensor) -> Tensor:
        sign = (descent - descent.mean(1, keepdim=True)).sign()
        return 1 + STRENGTH * (sign - sign.mean(1, keepdim=True))

    return FreeWeights(num_exits, batch_size, 1.0, form)


class MetaWeightNet(nn.Module):
    """Shu et al. (NeurIPS 2019): one weight a sample, from one loss, here its mean over exits."""

    def __init__(self, num_exits: int, batch_size: int) -> None:
        super().__init__()
        self.reweighter = SampleReweighter(1)

    def forward(self, exit_losses: ExitLosses) -> Tensor:
        """Weights [B, K], equal at every exit."""
        weights = self.reweighter(exit_losses.losses.mean(1, keepdim=True))
        return weights.expand_as(exit_losses.losses)


class LogInputs(SampleReweighter):
    """A reweighter that sees log(l + 1e-4), raw losses spanning decades."""

    def forward(self, losses: ExitLosses | Tensor) -> Tensor:
        """See :class:`SampleReweighter`."""
        assert isinstance(losses, ExitLosses)
        return super().forward(losses._replace(losses=(losses.losses + 1e-4).log()))


class StandardInputs(SampleReweighter):
    """A reweighter that sees log(l + 1e-4), standardised over the batch at each exit."""

    def forward(self, losses: ExitLosses | Tensor) -> Tensor:
        """See :class:`SampleReweighter`."""
        assert isinstance(losses, ExitLosses)
        logarithms = (losses.losses + 1e-4).log()
        std, mean = torch.std_mean(logarithms, 0)
        return super().forward(losses._replace(losses=(logarithms - mean) / (std + 1e-6)))


class PositiveForm(SampleReweighter):
    """Another function in the sigmoid's place, its mean over the batch 1 at each exit."""

    def positive(self, losses: Tensor) -> Tensor:
        """Weights but for their mean, [B, K]; here softplus(raw), which is never flat above."""
        return nn.functional.softplus(self.network(losses))

    def forward(self, losses: ExitLosses | Tensor) -> Tensor:
        """See :class:`SampleReweighter`."""
        assert isinstance(losses, ExitLosses)
        positive = self.positive(losses.losses.detach())
        return positive / positive.mean(0).clamp(min=1e-30)


class SoftsignForm(PositiveForm):
    """½·(1 + raw/(1 + |raw|)): the sigmoid's bounds, reached so slowly that a slope is left."""

    def positive(self, losses: Tensor) -> Tensor:
        """See :class:`PositiveForm`."""
        return (1 + nn.functional.softsign(self.network(losses))) / 2


class CentredForm(PositiveForm):
    """sigmoid(raw − its mean over the batch), raw of log(l + 1e-4): never all at one end."""

    def positive(self, losses: Tensor) -> Tensor:
        """See :class:`PositiveForm`."""
        raw: Tensor = self.network((losses + 1e-4).log())
        return (raw - raw.mean(0)).sigmoid()


def reweighter(
    kind: type[SampleReweighter] = SampleReweighter, **options: Any
) -> Callable[[int, int], nn.Module]:
    """A reweighter of this kind with these options."""
    return lambda num_exits, batch_size: kind(num_exits, **options)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        weighting: (K, B) → weighting.
        learned: the weighting is learned by a MetaReweightStep; else it just weighs.
        lr: of its Adam (weight decay 1e-4, as published); None for the step's own default, or for
            SGD of lr 1 of free weights.
        options: of the MetaReweightStep.
        meta: where the meta batches come from: the "halves" of each batch, "extra" held-out samples
            beside the training set, samples held out "of the training set", the "test" set
            (cheating: a bound), or the "next" training batch, no meta batch being given. None as
            the experiment says.
        meta_share: size of a meta batch over that of the training batch; not of halves.
        train_on: the "train" samples, the "clean" meta samples, or "both" as one training set.
        epochs: times those of the experiment.
        warm_up: share of the epochs before which every weight is 1.
        augment: shift by up to 2 pixels and mirror.
        dropout: before every exit.
        class_balanced: weights are over the frequency of the sample's class, too.
        frozen_from: the arm whose learned weighting weighs here from the start, fixed.
        frozen_on: the experiment that it was learned in; None for the same.
    """

    weighting: Callable[[int, int], Any] = uniform
    learned: bool = False
    lr: float | None = 1e-4
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: str | None = None
    meta_share: float = 1.0
    train_on: str = "train"
    epochs: int = 1
    warm_up: float = 0.0
    augment: bool = False
    dropout: float = 0.0
    class_balanced: bool = False
    frozen_from: str | None = None
    frozen_on: str | None = None


def ours(*, lr: float | None = 1e-4, **changes: Any) -> Arm:
    """The published method, with one thing changed."""
    names = ("meta", "meta_share", "warm_up", "augment", "dropout", "weighting")
    mine = {name: changes.pop(name) for name in names if name in changes}
    kind = changes.pop("kind", SampleReweighter)
    options = ("objective", "interval", "lagged", "train_fraction", "moves", "loss")
    steps = {name: changes.pop(name) for name in options if name in changes}
    return Arm(
        **{"weighting": reweighter(kind, **changes), **mine}, learned=True, lr=lr, options=steps
    )


ARMS: dict[str, Arm] = {
    "conventional": Arm(),
    "matched compute": Arm(epochs=4),
    "linear": Arm(linear),
    "inverse": Arm(inverse),
    "exit probability": Arm(exit_probability),
    "focal": Arm(focal),
    "uncertainty": Arm(Uncertainty),
    "GradNorm": Arm(GradNorm),
    "hard gates": Arm(hard_gates),
    "soft gates": Arm(soft_gates),
    "random thresholds": Arm(RandomThresholds),
    "L2RW": Arm(l2rw, learned=True, lr=None, options={"objective": MeanObjective()}),
    "Meta-Weight-Net": Arm(
        MetaWeightNet,
        learned=True,
        lr=1e-3,
        options={"objective": MeanObjective(), "pseudo_update": "gradient_descent"},
    ),
    "class-balanced": Arm(class_balanced=True),
    "clean added": Arm(train_on="both"),
    "clean only": Arm(train_on="clean"),
    # Ours, and one thing changed at a time.
    "published": ours(),
    "sigmoid": ours(form="sigmoid", lr=1e-3),
    "sigmoid, mean objective": ours(form="sigmoid", lr=1e-3, objective=MeanObjective()),
    "sigmoid, lr 1e-2": ours(form="sigmoid", lr=1e-2),
    "sigmoid, lr 1e-2, interval 10": ours(form="sigmoid", lr=1e-2, interval=10),
    "frozen random": Arm(reweighter()),
    "interval 10": ours(interval=10),
    "lr 1e-3": ours(lr=1e-3),
    "lr 1e-2": ours(lr=1e-2),
    "mean objective": ours(objective=MeanObjective()),
    "frozen learned": Arm(reweighter(), frozen_from="lr 1e-3"),
    "selection": Arm(selection),
    "hand-designed": Arm(hand_designed),
    "mean objective, lr 1e-3": ours(objective=MeanObjective(), lr=1e-3),
    "confidences, lr 1e-3": ours(inputs="confidences", lr=1e-3),
    "losses and confidences, lr 1e-3": ours(inputs="both", lr=1e-3),
    "strength 0.3, lr 1e-3": ours(strength=0.3, lr=1e-3),
    "strength 2, lr 1e-3": ours(strength=2.0, lr=1e-3),
    "p 0.5, lr 1e-3": ours(objective=BudgetedObjective(0.5), lr=1e-3),
    "p 1, lr 1e-3": ours(objective=BudgetedObjective(1.0), lr=1e-3),
    "interval 10, lr 1e-3": ours(interval=10, lr=1e-3),
    "mean over samples, lr 1e-3": ours(average_over="samples", lr=1e-3),
    "mean over both, lr 1e-3": ours(average_over="both", lr=1e-3),
    "extra meta": ours(meta="extra"),
    "extra meta, lr 1e-3": ours(meta="extra", lr=1e-3),
    "held-out meta, lr 1e-3": ours(meta="of the training set", lr=1e-3),
    "soft objective, lr 1e-3": ours(objective=SoftObjective(), lr=1e-3),
    "area objective, lr 1e-2": ours(objective=AREA, lr=1e-2),
    "log inputs, lr 1e-3": ours(kind=LogInputs, lr=1e-3),
    "standard inputs, lr 1e-3": ours(kind=StandardInputs, lr=1e-3),
    "warm-up, lr 1e-3": ours(warm_up=0.5, lr=1e-3),
    "conventional, augmented": Arm(augment=True),
    "frozen random, augmented": Arm(reweighter(), augment=True),
    "augmented": ours(augment=True),
    "augmented, lr 1e-3": ours(augment=True, lr=1e-3),
    "conventional, dropout": Arm(dropout=0.3),
    "dropout, lr 1e-3": ours(dropout=0.3, lr=1e-3),
    "combined": ours(
        kind=StandardInputs, objective=AREA, meta="extra", average_over="both", lr=1e-2
    ),
    **{
        f"{name}, lr 1e-2{suffix}": ours(kind=kind, form="sigmoid", lr=1e-2, interval=interval)
        for name, kind in (
            ("softplus", PositiveForm),
            ("softsign", SoftsignForm),
            ("centred logs", CentredForm),
        )
        for suffix, interval in (("", 1), (", interval 10", 10))
    },
    # What a step may leave out, against "sigmoid".
    "sigmoid, interval 10": ours(form="sigmoid", lr=1e-3, interval=10),
    "sigmoid, lagged": ours(form="sigmoid", lr=1e-3, lagged=True),
    "sigmoid, lagged, next batch": ours(form="sigmoid", lr=1e-3, lagged=True, meta="next"),
    "sigmoid, halves": ours(form="sigmoid", lr=1e-3, meta="halves"),
    "sigmoid, a quarter": ours(form="sigmoid", lr=1e-3, train_fraction=0.25, meta_share=0.25),
    "sigmoid, moves the end": ours(
        form="sigmoid", lr=1e-3, moves=lambda name: name.startswith(("exits.", "blocks.4."))
    ),
    # What a weight may see, and weights that need not be learned.
    "direct weights": Arm(
        lambda num_exits, batch_size: DirectWeights(num_exits), learned=True, lr=None
    ),
    "sigmoid, class, lr 1e-2, interval 10": ours(
        form="sigmoid", lr=1e-2, interval=10, num_classes=10
    ),
    "sigmoid, class, lr 1e-2": ours(form="sigmoid", lr=1e-2, num_classes=10),
    "sigmoid, class, mean objective, lr 1e-2, interval 10": ours(
        form="sigmoid", lr=1e-2, num_classes=10, objective=MeanObjective(), interval=10
    ),
    "predicted, interval 10": ours(form="predicted", lr=None, interval=10, num_classes=10),
    # What was learned before, as it is.
    "frozen, learned on digits": Arm(
        reweighter(form="sigmoid"),
        warm_up=0.2,
        frozen_from="sigmoid, lr 1e-2, interval 10",
        frozen_on="digits-symmetric",
    ),
    "greedy, halves": Arm(greedy, learned=True, lr=None),
    "greedy, extra meta": Arm(greedy, learned=True, lr=None, meta="extra"),
    "greedy, test as meta": Arm(greedy, learned=True, lr=None, meta="test"),
    "greedy, test as meta, mean objective": Arm(
        greedy, learned=True, lr=None, meta="test", options={"objective": MeanObjective()}
    ),
}
