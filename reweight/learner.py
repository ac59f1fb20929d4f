"""Learning the reweighter: what its weights, its optimizer and a hypergradient make of it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from reweight.hypergradient import Hypergradient
from reweight.losses import ExitLosses
from reweight.result import Update
from reweight.updates import AnyOptimizer, is_cold


class ReweighterLearner:
    """A reweighter and the optimizer that moves it.

    Args:
        reweighter: :class:`ExitLosses` → weights of the shape of the losses.
        optimizer: over parameters of the reweighter; None for Adam as published.
        clip_hypergradient: the largest norm of ∂L_meta/∂w that is passed on; None for any.

    Raises:
        ValueError: the optimizer holds something else, or the norm is not positive.
    """

    def __init__(
        self,
        reweighter: nn.Module,
        optimizer: Optimizer | None,
        clip_hypergradient: float | None = None,
    ) -> None:
        if clip_hypergradient is not None and not clip_hypergradient > 0:
            raise ValueError(f"`clip_hypergradient` must be positive, got {clip_hypergradient}.")
        self.reweighter = reweighter
        self.optimizer = _optimizer_for(reweighter, optimizer)
        self.clip_hypergradient = clip_hypergradient
        self.num_skipped = torch.zeros((), dtype=torch.int64)
        self._was_cold = False

    @property
    def is_trainable(self) -> bool:
        """Whether there is anything to learn; a frozen reweighter just weights."""
        return any(parameter.requires_grad for parameter in self.reweighter.parameters())

    def weights(self, losses: ExitLosses) -> Tensor:
        """W = g(l), shape [B, K]."""
        weights: Tensor = self.reweighter(losses)
        if weights.shape != losses.losses.shape:
            raise ValueError(
                f"`reweighter` must return weights of the shape of the losses, "
                f"{list(losses.losses.shape)}, got {list(weights.shape)}."
            )
        return weights

    def learn(self, losses: ExitLosses, weights: Tensor, hypergradient: Hypergradient) -> Update:
        """Θg ← Θg − β ∂L_meta/∂Θg, unless something is not finite."""
        assert self.optimizer is not None
        value = hypergradient.value
        values = (losses.losses.detach(), hypergradient.meta_loss.value, value)
        nonfinite = torch.stack([~value.isfinite().all() for value in values])
        ok = ~nonfinite.any()
        if self.clip_hypergradient is not None:
            value = value * (self.clip_hypergradient / value.norm()).clamp(max=1)
        self.optimizer.zero_grad(set_to_none=True)  # the user may have run a backward through it
        weights.backward(value)
        undo = step_where(self.optimizer, ok)
        self.num_skipped = self.num_skipped.to(ok.device) + ~ok
        return Update(hypergradient, nonfinite, undo)

    def warn_if_cold(self, optimizers: Sequence[AnyOptimizer]) -> None:
        """Any Adam is cold at its first step; it is a mistake only if it stays so."""
        cold = [type(one).__name__ for one in optimizers if is_cold(one)]
        if cold and self._was_cold:
            warnings.warn(
                f"{cold[0]} still has no state: its next step is the sign of the gradient, which "
                "hardly depends on the weights, so the reweighter learns nothing. Call "
                "optimizer.step() after each call.",
                stacklevel=5,
            )
        self._was_cold = bool(cold)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, text and containers of them."""
        return {
            "reweighter": self.reweighter.state_dict(),
            "reweighter_options": repr(self.reweighter),
            "reweighter_optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, or raise ValueError with nothing loaded."""
        options = repr(self.reweighter)
        if state_dict["reweighter_options"] != options:
            raise ValueError(
                f"`state_dict` must be of this reweighter:\n{options}\ngot\n"
                f"{state_dict['reweighter_options']}"
            )
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state_dict["reweighter_optimizer"])
        self.reweighter.load_state_dict(state_dict["reweighter"])
        self.num_skipped = state_dict["num_skipped"]


def step_where(optimizer: Optimizer, ok: Tensor) -> Callable[[], None]:
    """``optimizer.step()`` if ``ok`` holds, else nothing, without waiting for the device to tell.

    Takes the gradients away afterwards. State kept on another device than ``ok`` (the step count of
    Adam, which lives on the CPU) moves on in either case.

    Returns:
        A function that undoes the step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = torch.where(ok, parameter.grad, 0)
    before = {key: value.detach().clone() for key, value in _tensors(optimizer, parameters).items()}
    optimizer.step()
    with torch.no_grad():
        for key, value in _tensors(optimizer, parameters).items():
            if value.device == ok.device:
                value.copy_(torch.where(ok, value, before.get(key, torch.zeros_like(value))))
    optimizer.zero_grad(set_to_none=True)

    def undo() -> None:
        with torch.no_grad():
            for key, value in _tensors(optimizer, parameters).items():
                value.copy_(before.get(key, torch.zeros_like(value)))

    return undo


def _tensors(optimizer: Optimizer, parameters: list[Tensor]) -> dict[tuple[int, str], Tensor]:
    """The parameters and all tensors of their state."""
    tensors = {(i, ""): parameter for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[i, name] = value
    return tensors


def _optimizer_for(reweighter: nn.Module, optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer given, checked; else Adam as published, or None if nothing can be trained.

    Raises:
        ValueError: it holds something else than parameters of the reweighter.
    """
    own = {id(parameter) for parameter in reweighter.parameters()}
    if optimizer is None:
        lr = 1e-3 if getattr(reweighter, "form", None) == "sigmoid" else 1e-4
        return Adam(reweighter.parameters(), lr=lr, weight_decay=1e-4) if own else None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held <= own:
        raise ValueError(
            "`reweighter_optimizer` must hold parameters of `reweighter` alone, got others. Create "
            "it from reweighter.parameters()."
        )
    return optimizer
