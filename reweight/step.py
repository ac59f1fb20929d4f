"""MetaReweightStep: the order of events in one training step."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from reweight.batches import Batch, unpack
from reweight.forwards import (
    ExitForward,
    LossFunction,
    RandomState,
    plain_attention,
    unchanged_on_error,
)
from reweight.hypergradient import ESTIMATORS, MetaProblem
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import BudgetedObjective, Objective
from reweight.result import StepResult, Update
from reweight.reweighter import SampleReweighter
from reweight.updates import (
    Parameters,
    check_optimizer,
    is_cold,
    pseudo_update,
    step_where,
)


class MetaReweightStep:
    """Takes the place of ``loss.backward()``: learns the weights, then adds the weighted gradient.

    The reweighter is trained by differentiating the loss on the meta batch, after the optimizer's
    next step, with respect to the weights of that step. Everything else stays with the caller:
    ``optimizer.step()``, clipping, accumulation, schedulers. The extra passes use batch statistics,
    leave the buffers alone and replay the random state, so that with weights of 1 training is
    bitwise what it would be without.

    Args:
        model: returns the logits of K exits, see :func:`exit_cross_entropy` for the forms.
        optimizer: SGD, Adam or AdamW over the model's parameters; its groups, learning rates and
            state are read at every step and never changed.
        reweighter: g, with the model's number of exits.
        reweighter_optimizer: moves the reweighter. Default, as published: Adam with weight decay
            1e-4 and learning rate 1e-4, or 1e-3 for the sigmoid form.
        objective: the meta loss. Default ``BudgetedObjective()``.
        interval: update the reweighter at every interval-th call of ``backward``, beginning with
            the first. Default 1 (the publication uses 1 for CIFAR, 100 for ImageNet).
        estimator: "forward" (default; exact, one forward-mode pass) or "unrolled" (exact, double
            backward; slower and larger, for reference).
        loss: (logits, target) → :class:`ExitLosses` or losses [B, K].
        exits: takes the logits out of what the model returns. Default None: it returns them.

    Raises:
        TypeError: the optimizer has no rule (see :func:`reweight.updates.check_optimizer`).
        ValueError: an argument is out of range, or the optimizer holds none of the parameters.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem = nn.Linear(4, 8)
        ...         self.exits = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        ...     def forward(self, x):
        ...         features = self.stem(x).relu()
        ...         return [exit(features) for exit in self.exits]
        >>> model = Net()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=2))
        >>> train = (torch.randn(6, 4), torch.randint(3, (6,)))
        >>> meta = (torch.randn(6, 4), torch.randint(3, (6,)))
        >>> optimizer.zero_grad()
        >>> result = step.backward(train, meta)
        >>> optimizer.step()
        >>> result.weights.shape
        torch.Size([6, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        reweighter: SampleReweighter,
        *,
        reweighter_optimizer: Optimizer | None = None,
        objective: Objective | None = None,
        interval: int = 1,
        estimator: str = "forward",
        loss: LossFunction = exit_cross_entropy,
        exits: Callable[[Any], Any] | None = None,
    ) -> None:
        check_optimizer(optimizer)
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"`estimator` must be one of {', '.join(ESTIMATORS)}, got {estimator!r}."
            )
        if reweighter_optimizer is None:
            lr = 1e-3 if reweighter.form == "sigmoid" else 1e-4
            reweighter_optimizer = Adam(reweighter.parameters(), lr=lr, weight_decay=1e-4)
        self.model, self.optimizer, self.reweighter = model, optimizer, reweighter
        self.reweighter_optimizer = reweighter_optimizer
        self.objective = BudgetedObjective() if objective is None else objective
        self.interval, self.estimator = interval, estimator
        self.num_calls = 0
        self.num_skipped = torch.zeros((), dtype=torch.int64)
        """How many updates of the reweighter were left out for a value that was not finite."""
        self._forward = ExitForward(model, exits, loss)
        self._was_cold = False
        if not self._held_parameters():
            raise ValueError(
                "`optimizer` must hold parameters of `model`, got one that holds none of them. "
                "Create it from model.parameters(), after moving the model to its device."
            )

    def __call__(self, train: Batch, meta: Batch) -> StepResult:
        """``zero_grad``, :meth:`backward` and ``optimizer.step`` in one."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        try:
            result = self.backward(train, meta)
        except BaseException:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            raise
        self.optimizer.step()
        return result

    def backward(self, train: Batch, meta: Batch) -> StepResult:
        """Update the reweighter if it is due, then add the gradient of L_tr to ``.grad``.

        Args:
            train: (inputs, target) of the batch to train on.
            meta: (inputs, target) of the batch that judges the step.

        Returns:
            :class:`StepResult`.

        Raises:
            TypeError: a batch is not a pair, or the model returns something unexpected.
            ValueError: shapes or numbers of exits disagree, a batch is empty, a target is out of
                range, or no loss depends on a parameter. Nothing has changed then.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        with unchanged_on_error(self.model) as random_state, self._attention():
            losses = _with_graph(self._forward(*train))
            update = None
            if self.num_calls % self.interval == 0:
                after = RandomState(self.model)
                update = self._update(losses, train, meta, random_state)
                after.restore()
            with torch.no_grad():
                weights = self.reweighter(losses)
            # A second backward of the same graph: the weighted gradient needs no further forward.
            losses.losses.backward(losses.sample_shares() * weights)
        self.num_calls += 1
        return StepResult.of(losses, weights, update)

    def update_reweighter(self, train: Batch, meta: Batch) -> StepResult:
        """Update the reweighter and nothing else, for loops that keep their own forward.

        Parameters, buffers, ``.grad``, optimizer state and random state stay bitwise as they are.
        Arguments, returns and errors are those of :meth:`backward`; ``interval`` plays no part.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        random_state = RandomState(self.model)
        try:
            with self._attention():
                losses = _with_graph(self._forward.at({}, *train))
                update = self._update(losses, train, meta, random_state)
        finally:
            random_state.restore()
        with torch.no_grad():
            weights = self.reweighter(losses)
        return StepResult.of(losses, weights, update)

    def state_dict(self) -> dict[str, Any]:
        """Everything the step adds to a training run: tensors, numbers and containers of them."""
        return {
            "reweighter": self.reweighter.state_dict(),
            "reweighter_optimizer": self.reweighter_optimizer.state_dict(),
            "num_calls": self.num_calls,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it is of another kind, or of a reweighter of another shape. Nothing has been
                loaded then.
        """
        expected = self.state_dict()
        if set(state_dict) != set(expected):
            raise ValueError(
                f"`state_dict` must have the keys {sorted(expected)}, got {sorted(state_dict)}."
            )
        shapes, got = (
            {name: list(tensor.shape) for name, tensor in state["reweighter"].items()}
            for state in (expected, state_dict)
        )
        if shapes != got:
            raise ValueError(
                f"`state_dict` must hold a reweighter with tensors of shape {shapes}, got {got}."
            )
        self.reweighter_optimizer.load_state_dict(state_dict["reweighter_optimizer"])
        self.reweighter.load_state_dict(state_dict["reweighter"])
        self.num_calls = state_dict["num_calls"]
        self.num_skipped = state_dict["num_skipped"]

    def _update(
        self, losses: ExitLosses, train: Batch, meta: Batch, random_state: RandomState
    ) -> Update:
        """Learn from one meta step; ``losses`` are of ``train``, begun at ``random_state``."""
        self._warn_if_cold()
        parameters = self._held_parameters()

        def replay(at: Parameters) -> Tensor:
            random_state.restore()
            with plain_attention():
                return self._forward.at(at, *train).losses

        weights = self.reweighter(losses)
        hypergradient = ESTIMATORS[self.estimator](
            MetaProblem(
                parameters=parameters,
                losses=losses.losses,
                sample_shares=losses.sample_shares(),
                weights=weights.detach(),
                update=lambda gradients: pseudo_update(self.optimizer, parameters, gradients),
                meta_loss=lambda at: self.objective(self._forward.at(at, *meta)),
                replay=replay,
            )
        )
        values = (losses.losses, hypergradient.meta_loss.value, hypergradient.value)
        nonfinite = torch.stack([~value.detach().isfinite().all() for value in values])
        ok = ~nonfinite.any()
        weights.backward(hypergradient.value)
        step_where(self.reweighter_optimizer, ok)
        self.num_skipped = self.num_skipped.to(ok.device) + ~ok
        return Update(hypergradient, nonfinite)

    def _held_parameters(self) -> Parameters:
        """θ: the trainable parameters of the model that the optimizer moves, by name."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) in held
        }

    def _attention(self) -> AbstractContextManager[None]:
        return plain_attention() if self.estimator == "unrolled" else nullcontext()

    def _warn_if_cold(self) -> None:
        """Any Adam is cold at its first step; it is a mistake only if it stays so."""
        cold = is_cold(self.optimizer)
        if cold and self._was_cold:
            warnings.warn(
                f"{type(self.optimizer).__name__} still has no state: its next step is the sign of "
                "the gradient, which hardly depends on the weights, so the reweighter learns "
                "nothing. Call optimizer.step() after each call.",
                stacklevel=4,
            )
        self._was_cold = cold


def _with_graph(losses: ExitLosses) -> ExitLosses:
    if not losses.losses.requires_grad:
        raise ValueError(
            "`model` must return logits that depend on a trainable parameter, got losses without a "
            "graph. Are all parameters frozen, or gradients switched off?"
        )
    return losses
