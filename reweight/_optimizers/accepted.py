"""The optimizers of the user: which there are, what they hold and come to, which are refused."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torchopt
from torch import Tensor, nn, optim
from torchopt.base import GradientTransformation

from reweight._checks import kind
from reweight._optimizers.scalars import Refused
from reweight._ranks.collectives import is_sharded
from reweight._ranks.shards import parameters_of

_logger = logging.getLogger("reweight")

Group: TypeAlias = dict[str, Any]
Parameters: TypeAlias = dict[str, Tensor]
AnyOptimizer: TypeAlias = optim.Optimizer | torchopt.Optimizer
Exactness: TypeAlias = Literal["exact", "gradient_descent"]


class PseudoUpdate(NamedTuple):
    """θ̂ and what had to be left out of its derivative.

    Attributes:
        gradients: what it is a function of, by name.
        parameters: θ̂ by name, differentiable in the gradients.
        num_zero_moments: how many entries have no derivative, because gradient and second moment
            are both 0 there (dead units, a bias before BatchNorm), or for want of a finite slope;
            it is taken as 0.
    """

    gradients: Parameters
    parameters: Parameters
    num_zero_moments: Tensor | int


def as_optimizers(optimizer: Any, parameters: Sequence[Tensor]) -> tuple[AnyOptimizer, ...]:
    """One optimizer or several as a tuple; a bare transformation of torchopt gets an optimizer."""
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    if isinstance(optimizer, GradientTransformation):  # a tuple itself
        several = [torchopt.Optimizer(parameters, optimizer)]
    for one in several:
        if not isinstance(one, optim.Optimizer | torchopt.Optimizer):
            inside = " Pass its `optimizer`." if hasattr(one, "optimizer") else ""
            raise TypeError(
                "`optimizer` must be an optimizer of torch.optim or torchopt, a gradient "
                f"transformation of torchopt, or a list of optimizers, got {kind(one)}.{inside}"
            )
    held = list(map(id, held_by(several)))
    if len(set(held)) < len(held):
        raise ValueError("`optimizer` must hold each parameter once, got one that is held twice.")
    trainable = {id(p) for p in parameters if p.requires_grad}
    if not trainable:
        raise ValueError(
            "`model` must have a trainable parameter, got none. Call model.requires_grad_() or "
            "that of the part to train."
        )
    if not trainable & set(held):
        raise ValueError(
            "`optimizer` must hold parameters of `model`, got one that holds none of them. Create "
            "it from model.parameters(), after moving the model to its device."
        )
    return tuple(several)


def log_what_stays(model: nn.Module, optimizers: Sequence[AnyOptimizer]) -> None:
    """Say what the look-ahead leaves out.

    That is trainable parameters of no optimizer, others that it holds, and hooks of its step.
    """
    named: Parameters = parameters_of(model)
    held = {id(parameter) for parameter in held_by(optimizers)}
    left = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
    if left:
        _logger.warning(
            "`optimizer` holds all trainable parameters of `model` but %d, which stay as they are: "
            "%s. Freeze them, or give them to it; several optimizers go in as a list.",
            len(left),
            ", ".join(left[:3] + ["…"] * (len(left) > 3)),
        )
    others = held - set(map(id, named.values()))
    if others:
        _logger.warning(
            "`optimizer` holds %d parameters that are not of `model`, which the look-ahead leaves "
            "as they are. If the loss depends on them, make it a part of the model.",
            len(others),
        )
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(each, name, None) for each in optimizers for name in hooks):
        _logger.warning(
            "`optimizer` has hooks of its step, which the look-ahead leaves out. If one changes "
            "parameters or gradients, do that after optimizer.step() or in the model instead."
        )


def held_by(optimizers: Sequence[AnyOptimizer]) -> Iterator[Tensor]:
    """The parameters of all groups."""
    for optimizer in optimizers:
        for group in groups_of(optimizer):
            yield from group["params"]


def held_parameters(
    model: nn.Module,
    optimizers: Sequence[AnyOptimizer],
    choice: Callable[[str], bool] | None = None,
) -> Parameters:
    """θ: the trainable parameters of the model that an optimizer moves, by name.

    Of these only what the choice, a function of the name, is true of; None chooses all.
    """
    held = {id(parameter) for parameter in held_by(optimizers)}
    parameters: Parameters = {
        name: parameter
        for name, parameter in parameters_of(model).items()
        if parameter.requires_grad and id(parameter) in held and (choice is None or choice(name))
    }
    if any(parameter.is_complex() for parameter in parameters.values()):
        raise ValueError("`model` must have real parameters, got complex ones.")
    return parameters


def require_apart(parameters: Parameters) -> None:
    """Raise ValueError if two parameters have an entry in the same place of memory.

    One tensor by two names is a single parameter; two over one memory cannot be moved apart.
    """
    by_storage = defaultdict(list)
    for name, p in parameters.items():
        if not is_sharded(p) and p.numel() and p.device.type != "meta":
            by_storage[p.untyped_storage().data_ptr()].append((name, p))
    for sharing in by_storage.values():
        for (name, one), (other_name, other) in combinations(sharing, 2):
            if torch.isin(_places(one), _places(other)).any():
                raise ValueError(
                    f"`model` must have each parameter in memory of its own, got {name} and "
                    f"{other_name}, which share theirs. Tie them as one parameter: "
                    f"module.{name.rpartition('.')[2]} = other."
                )


def _places(tensor: Tensor) -> Tensor:
    """Where in its storage the entries are, in bytes."""
    size, stride = tensor.size(), tensor.stride()
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    every = torch.arange(int(reach)).as_strided(size, stride).flatten()
    return (every + int(tensor.storage_offset())) * tensor.element_size()


def groups_of(optimizer: AnyOptimizer) -> list[Group]:
    """The param groups, in the form of torch.optim."""
    if isinstance(optimizer, torchopt.Optimizer):
        return [{"params": members} for members in optimizer.param_groups]
    return optimizer.param_groups


def check_differentiable(optimizer: AnyOptimizer, exactness: Exactness = "exact") -> None:
    """Refuse, with the reason, an optimizer whose step is known to have no derivative.

    Any other is verified where it is used first.

    Raises:
        TypeError: its step needs a closure, it only wraps another optimizer, or it has no learning
            rate to take a plain gradient step with.
    """
    if exactness == "gradient_descent":
        if not all("lr" in group for group in groups_of(optimizer)):
            raise TypeError(
                "`optimizer` must have a learning rate for pseudo_update='gradient_descent', got "
                f"{kind(optimizer)}. Leave pseudo_update away."
            )
        return
    if isinstance(optimizer, torchopt.Optimizer):
        return
    name, inner = type(optimizer).__name__, getattr(optimizer, "optimizer", None)
    if isinstance(inner, optim.Optimizer) and type(optimizer).__module__.startswith("accelerate"):
        raise TypeError(f"`optimizer` must be bare, got {name} around one: pass its `optimizer`.")
    closure = signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        reason = "its step evaluates the loss itself, by a closure"
        raise TypeError(why_not(optimizer, reason))


def why_not(optimizer: optim.Optimizer, error: Exception | str) -> str:
    """What to say, and what to do, where the step of an optimizer cannot be differentiated."""
    reason = str(error)
    if isinstance(error, Exception) and not isinstance(error, Refused):
        reason = f"its step raises {type(error).__name__}: {reason}"
    advice = (
        "Pass pseudo_update='gradient_descent' to take a plain gradient step for it, which is an "
        "approximation."
    )
    base = getattr(optimizer, "base_optimizer", None)
    if isinstance(base, optim.Optimizer):
        advice = (
            "Pass its `base_optimizer`, and call step.update_reweighter before its two passes: "
            "docs/recipes.md shows it."
        )
    return (
        "`optimizer` must have a step that can be differentiated, got "
        f"{type(optimizer).__name__}: {reason.rstrip('.')}. {advice}"
    )


def is_cold(optimizer: AnyOptimizer) -> bool:
    """Whether this is an Adam without state: its step is sign(g), with derivative about 0."""
    kinds = (optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax)
    return isinstance(optimizer, kinds) and not any(
        "step" in state and state["step"] is not None for state in optimizer.state.values()
    )
