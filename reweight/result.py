"""What a step reports."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from reweight.losses import ExitLosses
from reweight.objectives import MetaLoss


class Update(NamedTuple):
    """One update of the reweighter.

    Attributes:
        meta_loss: L_meta and the shares it rests on, of all ranks.
        hypergradient_norm: Euclidean norm of ∂L_meta/∂w, of all ranks, scalar.
        nonfinite: whether train losses, meta loss and hypergradient held a value that is not
            finite, on any rank, and whether the reweighter would have come to, shape [4], bool.
        num_zero_moments: entries of the pseudo update with no derivative, taken as 0.
        difference: how far the two ways to what the weights do are apart, scalar, or None.
        hypergradient: ∂L_meta/∂w of this rank's samples, shape [B, K].
        undo: puts the reweighter and its optimizer back.
    """

    meta_loss: MetaLoss
    hypergradient_norm: Tensor
    nonfinite: Tensor
    num_zero_moments: Tensor | int
    difference: Tensor | None
    hypergradient: Tensor
    undo: Callable[[], None]


class StepResult(NamedTuple):
    """What a step did, as tensors without a graph; nothing is copied from the device until asked.

    Of a distributed step, losses, weights and train loss are those of this rank's samples; the rest
    is that of all ranks, and the same on each.

    Attributes:
        losses: l[i,k], and with them confidence, correctness and validity of every sample.
        weights: w[i,k] after the update of the reweighter, shape [B, K].
        train_loss: L_tr with these weights, the auxiliary loss added, scalar.
        meta_loss: L_meta at the updated parameters, scalar; None where the step had no meta update.
        exit_shares: share of the meta samples each exit was judged on, shape [K], or None.
        hypergradient_norm: Euclidean norm of ∂L_meta/∂w, scalar, or None.
        nonfinite: whether the train losses, the meta loss and the hypergradient held a value that
            is not finite, or the reweighter would have come to hold one, shape [4], bool, or None.
            One True and the reweighter stayed as it was.
        num_zero_moments: entries whose update has no derivative (Adam, gradient and second moment
            both 0); it was taken as 0. Of sharded parameters those of this rank are counted.
        backward_difference: how far ∂L_meta/∂w is from what the backward of the model says: the
            relative difference of Σ w·∂L_meta/∂w and ⟨v, ∇L_tr⟩, which are equal; scalar, or None
            where there was no update, or one of some rows of the train batch alone. Rounding, or
            the step warns.
        hypergradient: ∂L_meta/∂w at the weights before the update, shape [B, K], negative where
            more weight lowers the meta loss; of the samples of ``losses``, but for ``lagged``
            without a meta batch, where it is of those of the call before. None without an update.
    """

    losses: ExitLosses
    weights: Tensor
    train_loss: Tensor
    meta_loss: Tensor | None = None
    exit_shares: Tensor | None = None
    hypergradient_norm: Tensor | None = None
    nonfinite: Tensor | None = None
    num_zero_moments: Tensor | int = 0
    backward_difference: Tensor | None = None
    hypergradient: Tensor | None = None

    def __str__(self) -> str:
        """The summary, not all tensors."""
        return self.summary()

    def summary(self) -> str:
        """One line for a log; waits for the device."""
        parts = [f"train loss {self.train_loss.item():.4f}"]
        if self.meta_loss is not None:
            parts.append(f"meta loss {self.meta_loss.item():.4f}")
        valid = self.losses.valid  # [B] or [B, K]
        weights = self.weights if valid is None else self.weights[valid]
        if weights.numel():
            parts.append(f"weights {weights.min().item():.2f}…{weights.max().item():.2f}")
        else:
            parts.append("no sample counts")
        if self.nonfinite is not None and self.nonfinite.any():
            names = ("train losses", "meta loss", "hypergradient", "reweighter")
            found = [name for name, bad in zip(names, self.nonfinite.tolist(), strict=True) if bad]
            parts.append(f"reweighter not updated: non-finite {', '.join(found)}")
        elif self.hypergradient_norm is not None and not self.hypergradient_norm:
            parts.append("reweighter not updated: the hypergradient is 0")
        return ", ".join(parts)

    def scalars(self) -> dict[str, Tensor]:
        """What a logger takes, one number each, detached and still on the device.

        Returns:
            ``train_loss``; ``loss/exit_k`` and ``weight/exit_k``, means over the samples, k from 1;
            ``weight_std/exit_k``, their standard deviation, near 0 while nothing has been learned;
            where the reweighter was updated also ``meta_loss``, ``hypergradient_norm`` and
            ``share/exit_k``, the share of the meta batch that exit k is judged on.
        """
        found = {"train_loss": self.train_loss}
        mean = self.losses.mean_over_samples
        average = mean(self.weights)
        columns = {
            "loss": mean(self.losses.losses),
            "weight": average,
            "weight_std": mean((self.weights - average).square()).sqrt(),
            "share": self.exit_shares,
        }
        for name, values in columns.items():
            for k, value in enumerate([] if values is None else values, start=1):
                found[f"{name}/exit_{k}"] = value
        for name in ("meta_loss", "hypergradient_norm"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found

    @classmethod
    def of(
        cls,
        losses: ExitLosses,
        weights: Tensor,
        update: Update | None,
        shares: Tensor | None = None,
    ) -> "StepResult":
        """The report of a step with these losses and weights, and perhaps an update.

        Where they are known, the shares are those of the samples in the mean of this rank alone.
        """
        losses, weights = losses._replace(losses=losses.losses.detach()), weights.detach()
        each, counted = weights * losses.losses, losses.counted
        each = each if counted is None else each.masked_fill(~counted, 0)
        train_loss = (each * (losses.sample_shares() if shares is None else shares)).sum()
        auxiliary = None if losses.auxiliary is None else losses.auxiliary.detach()
        if auxiliary is not None:
            losses, train_loss = losses._replace(auxiliary=auxiliary), train_loss + auxiliary
        if update is None:
            return cls(losses, weights, train_loss)
        return cls(
            losses,
            weights,
            train_loss,
            update.meta_loss.value,
            update.meta_loss.shares,
            update.hypergradient_norm,
            update.nonfinite,
            update.num_zero_moments,
            update.difference,
            update.hypergradient,
        )


class StepCheck(NamedTuple):
    """What ``step.check`` found; ``print`` shows it as a table.

    Attributes:
        estimator: where ∂L_meta/∂w comes from: "auto" and "forward" are forward mode, exact.
        operations: those of the model that have no forward mode, and where their tangents come
            from, by name; forward mode alone goes down to them.
        optimizers: how the next step of each is differentiated.
        backward_difference: as in :class:`StepResult`.
        num_zero_moments: likewise.
        signal: the correlation of ∂L_meta/∂w by two halves of the meta batch, over the samples:
            1 where they ask for the same, near 0 where all is noise; 0 where ∂L_meta/∂w is, and
            None where the meta batch cannot be parted.
        hooks: parameters and modules whose gradients hooks see or change.
        interval: at every which step the reweighter is updated.
        seconds: of a forward and backward, and of a step with an update.
        memory: the most bytes that either holds beyond those before; None on a CPU.
        messages: the warnings.
    """

    estimator: str
    operations: dict[str, str]
    optimizers: list[str]
    backward_difference: float | None
    num_zero_moments: int
    signal: float | None
    hooks: list[str]
    interval: int
    seconds: tuple[float, float]
    memory: tuple[int, int] | None
    messages: list[str]

    @property
    def cost(self) -> float:
        """Time of a step over that of a forward and backward, in the mean over the interval."""
        plain, step = self.seconds
        return (step + (self.interval - 1) * plain) / (self.interval * plain)

    def __str__(self) -> str:
        forward = self.estimator in ("auto", "forward")
        exact = {"finite_difference": "approximate", "unrolled": "exact, by double backward"}
        agrees, signal, memory = self.backward_difference, self.signal, "not counted on a CPU"
        if self.memory is not None:
            memory = " and ".join(f"{size / 2**20:,.0f} MiB" for size in self.memory)
            memory += ", of a forward and backward and of a step with an update"
        plain, step = (1e3 * each for each in self.seconds)
        rows = [
            (
                "hypergradient",
                "exact, by forward mode" if forward else exact.get(self.estimator, self.estimator),
            ),
            *(("", f"{name}: {way}") for name, way in self.operations.items()),
            *(("optimizer", each) for each in self.optimizers),
            (
                "held to your backward",
                "not in this step" if agrees is None else f"differs by {agrees:.1e}",
            ),
            (
                "signal",
                "the meta batch cannot be parted"
                if signal is None
                else "none: the hypergradient is 0. Is the optimizer's learning rate 0?"
                if not signal
                else f"{signal:+.2f}, the correlation of what its halves ask for",
            ),
            (
                "time",
                f"{self.cost:.2f} times a forward and backward at interval={self.interval} "
                f"({plain:.1f} ms; {step:.1f} ms with an update)",
            ),
            ("memory", memory),
            ("without derivative", f"{self.num_zero_moments} entries of the optimizer's step"),
            ("hooks", ", ".join(self.hooks) or "none"),
            *(("warning", message) for message in self.messages),
        ]
        return "\n".join(f"{name:<22} {value}" for name, value in rows)
