"""Learning the reweighter: what its weights, its optimizer and a hypergradient make of it."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from reweight._checks import check_positive, check_whole, kind
from reweight._meta.guarded_step import Snapshot, step_where
from reweight._meta.problem import Hypergradient, gradients_of, relative_difference
from reweight._optimizers.accepted import AnyOptimizer, is_cold
from reweight._passes.forward import LossFunction
from reweight._ranks.collectives import gather, joined, require_same, sums_by_name
from reweight._ranks.wrappers import unwrap
from reweight.losses import ExitLosses
from reweight.objectives import BudgetedObjective, Objective
from reweight.result import Update


class ReweighterLearner:
    """A reweighter and the optimizer that moves it.

    Args:
        reweighter: :class:`ExitLosses` → weights of the shape of the losses.
        optimizer: over parameters of the reweighter; None for Adam with decoupled weight decay.
        interval: it is updated at every interval-th call of the step.
        clip_hypergradient: the largest norm of ∂L_meta/∂w that is passed on; None for any.

    Raises:
        TypeError: the reweighter is no module, or wrapped for distributed training, or another
            argument is of another type.
        ValueError: the optimizer holds something else, or a number is out of range.
    """

    default_objective: Callable[[], Objective] = BudgetedObjective
    begins_at_zero = False  # the look-ahead, in its weights
    num_steps = 1  # of the optimizer, at each update

    def __init__(
        self,
        reweighter: nn.Module,
        optimizer: Optimizer | None,
        interval: int,
        clip_hypergradient: float | None,
    ) -> None:
        check_whole("interval", interval)
        if clip_hypergradient is not None:
            check_positive("clip_hypergradient", clip_hypergradient)
        if not isinstance(reweighter, nn.Module):
            raise TypeError(
                "`reweighter` must be a module such as SampleReweighter(num_exits=3), got "
                f"{kind(reweighter) if isinstance(reweighter, type) else repr(reweighter)}."
            )
        if unwrap(reweighter)[1] is not None:
            raise TypeError(
                "`reweighter` must be bare, got one in DistributedDataParallel or sharded. Pass "
                "the plain module: the step adds up its gradient over the ranks."
            )
        self.reweighter = reweighter
        self.optimizer = _optimizer_for(reweighter, optimizer, interval)
        self.interval, self.clip_hypergradient = interval, clip_hypergradient
        self.num_skipped = torch.zeros((), dtype=torch.int64)
        self.num_calls = 0  # of the step: what its interval counts
        self.num_updates = 0
        self.was_cold = self._has_stepped = False

    @property
    def is_trainable(self) -> bool:
        """Whether there is anything to learn; a frozen reweighter just weights."""
        return any(parameter.requires_grad for parameter in self.reweighter.parameters())

    @property
    def is_due(self) -> bool:
        """Whether the next call of the step is one to learn from."""
        return self.is_trainable and self.num_calls % self.interval == 0

    def loss(self, given: LossFunction) -> LossFunction:
        """What gives the losses and all that the reweighter sees of them."""
        return given

    def require_trainable(self) -> None:
        """Raise ValueError if there is nothing to learn."""
        if not self.is_trainable:
            raise ValueError("`reweighter` must have a trainable parameter to update, got none.")

    @torch.no_grad()
    def weights(self, losses: ExitLosses, update: Update | None) -> Tensor:
        """The weights of the step, after this update if there was one, shape [B, K]."""
        return self.ahead(losses)

    def ahead(self, losses: ExitLosses) -> Tensor:
        """The weights w = g(l) of the step that the look-ahead takes, shape [B, K]."""
        return self._checked(losses)

    def _checked(self, losses: ExitLosses, *hypergradient: Tensor) -> Tensor:
        """What the reweighter gives, which has the shape of the losses."""
        losses = losses._replace(losses=losses.losses.detach())
        weights: Tensor = self.reweighter(losses, *hypergradient)
        if weights.shape != losses.losses.shape:
            raise ValueError(
                f"`reweighter` must return weights of the shape of the losses, "
                f"{list(losses.losses.shape)}, got {list(weights.shape)}."
            )
        return weights

    def learn(self, losses: ExitLosses, weights: Tensor, hypergradient: Hypergradient) -> Update:
        """Θg ← Θg − β ∂L_meta/∂Θg, unless something is not finite or would come to be so."""
        assert self.optimizer is not None
        update, ok = self._report(losses, hypergradient)
        value = update.hypergradient
        if self.clip_hypergradient is not None:
            value = value * (self.clip_hypergradient / update.hypergradient_norm).clamp(max=1)
        before, counts = Snapshot(self.optimizer), (self.num_skipped, self.num_updates)

        def undo() -> None:
            before.restore()
            self.num_skipped, self.num_updates = counts

        before.clear_gradients()  # the user may have run a backward through it
        descend, taken = self._descent(losses, weights, value, ok), ok
        for _ in range(self.num_steps if weights.requires_grad else 0):
            # The very first step makes the optimizer's state and so waits for the device to say if
            # it is to be taken; from then on one that is not to be is taken back where it happens.
            if not self._has_stepped and not bool(taken):
                break
            descend()
            own = {str(i): parameter for i, parameter in enumerate(before.parameters)}
            for name, gradient in sums_by_name(gradients_of(own), own).items():
                own[name].grad = gradient
            last = before if self.num_steps == 1 else Snapshot(self.optimizer)
            taken = step_where(self.optimizer, taken, last)
            if not self._has_stepped and not bool(taken):
                last.restore()
            else:
                self._has_stepped = True
        nonfinite = torch.cat([update.nonfinite, (ok > taken).unsqueeze(0)])
        self._count(nonfinite)
        return update._replace(nonfinite=nonfinite, undo=undo)

    def _descent(
        self, losses: ExitLosses, weights: Tensor, value: Tensor, ok: Tensor
    ) -> Callable[[], None]:
        """What adds ∂L_meta/∂Θg to ``.grad``: this rank's part."""
        return partial(weights.backward, value)

    def _count(self, nonfinite: Tensor) -> None:
        self.num_updates += 1
        self.num_skipped = self.num_skipped.to(nonfinite.device) + nonfinite.any()

    def _report(self, losses: ExitLosses, hypergradient: Hypergradient) -> tuple[Update, Tensor]:
        """What is known before anything is learned, and whether it is something to learn from."""
        value, meta_loss = hypergradient.value, hypergradient.meta_loss
        told = [losses.losses.detach(), meta_loss.value, value]
        largest = torch._foreach_norm(told, torch.inf)
        parts = () if hypergradient.both_ways is None else hypergradient.both_ways
        # From every rank, so that all clip alike, and all skip or none does.
        every = gather(torch.stack([*largest, meta_loss.value, *parts, value.norm()]))
        alone = len(every) == 1
        sums, norm = (every[0], every[0, -1]) if alone else (every.sum(0), every[:, -1].norm())
        nonfinite = sums[:3] - sums[:3] != 0  # or it is a number
        ok = (norm > 0) > nonfinite.any()  # 0 says nothing, and decay alone is no lesson
        difference = relative_difference(sums[4:6]) if len(parts) else None
        meta_loss = meta_loss._replace(value=sums[3])
        zero = hypergradient.num_zero_moments
        return Update(meta_loss, norm, nonfinite, zero, difference, value, lambda: None), ok

    def require_same(self, options: object, group: Any, device: torch.device) -> None:
        """Raise ValueError on every rank unless all begin alike, with these options of the step."""
        facts = {
            "the options of the step": options,
            "`reweighter`": repr(self.reweighter),
            "the state of `reweighter`": self.reweighter.state_dict(),
            "`reweighter_optimizer`": repr(self.optimizer),
        }
        with joined(group):
            require_same(facts, device)

    def warn_if_cold(self, optimizers: Sequence[AnyOptimizer]) -> None:
        """Any Adam is cold at its first step; it is a mistake only if it stays so."""
        cold = [type(one).__name__ for one in optimizers if is_cold(one)]
        if cold and self.was_cold:
            warnings.warn(
                f"{cold[0]} still has no state: its next step is the sign of the gradient, which "
                "hardly depends on the weights, so the reweighter learns nothing. Call "
                "optimizer.step() after each call.",
                stacklevel=5,
            )
        self.was_cold = bool(cold)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, text and containers of them."""
        return {
            "reweighter": self.reweighter.state_dict(),
            "reweighter_options": repr(self.reweighter),
            "reweighter_optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "num_skipped": self.num_skipped,
            "num_calls": self.num_calls,
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, or raise ValueError with nothing loaded."""
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(
                f"`state_dict` must have the keys {sorted(self.state_dict())}, got "
                f"{sorted(state_dict)}."
            )
        for name, ours, theirs in (
            ("reweighter_options", repr(self.reweighter), state_dict["reweighter_options"]),
            ("reweighter", *map(_shapes, (self.reweighter.state_dict(), state_dict["reweighter"]))),
            (
                "reweighter_optimizer",
                None if self.optimizer is None else _options(self.optimizer.state_dict()),
                _options(state_dict["reweighter_optimizer"]),
            ),
        ):
            if ours != theirs:
                raise ValueError(
                    f"`state_dict` must be of this reweighter and optimizer; its {name} is\n"
                    f"{theirs}\nand not\n{ours}"
                )
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state_dict["reweighter_optimizer"])
        self.reweighter.load_state_dict(state_dict["reweighter"])
        for name in ("num_skipped", "num_calls", "num_updates"):
            setattr(self, name, state_dict[name])
        self._has_stepped = self.optimizer is not None and bool(self.optimizer.state)


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state_dict.items()}


def _options(state_dict: dict[str, Any] | None) -> list[list[str]] | None:
    """The names of the options of every group, which tell the kinds of optimizers apart."""
    return None if state_dict is None else [sorted(g) for g in state_dict["param_groups"]]


def _optimizer_for(
    reweighter: nn.Module, optimizer: Optimizer | None, interval: int
) -> Optimizer | None:
    """The optimizer given, checked; else Adam, or None if nothing can be trained.

    The hypergradient goes with the model's learning rate, 1e-9 where a transformer is fine-tuned.
    So that what is learned does not, the weight decay, of the published size, is decoupled, and
    Adam's epsilon far below what a hypergradient may be.

    The sigmoid form's learning rate, published for an update at every step, grows with the
    interval: with a tenth of the updates, ten times the rate was needed, and enough. That of the
    predicted form is of a regression.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it holds something else than parameters of the reweighter.
    """
    own = {id(parameter) for parameter in reweighter.parameters()}
    if optimizer is None:
        form = getattr(reweighter, "form", None)
        lr = {"sigmoid": 1e-3 * min(interval, 10), "predicted": 1e-2}.get(str(form), 1e-4)
        # In one kernel, where launches cost more than arithmetic.
        fused = all(parameter.is_cuda for parameter in reweighter.parameters()) or None
        options: dict[str, Any] = {"eps": 1e-16, "weight_decay": 1e-4, "fused": fused}
        return AdamW(reweighter.parameters(), lr, **options) if own else None
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`reweighter_optimizer` must be an optimizer of torch.optim, got {kind(optimizer)}. "
            "Pass one such as torch.optim.Adam(reweighter.parameters(), lr=1e-3)."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held <= own:
        raise ValueError(
            "`reweighter_optimizer` must hold parameters of `reweighter` alone, got others. Create "
            "it from reweighter.parameters()."
        )
    return optimizer
