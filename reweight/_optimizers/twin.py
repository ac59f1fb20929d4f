"""An optimizer around other parameters, with the structure of its state but not its memory."""

import copy
from collections import deque
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn, optim
from torch.overrides import TorchFunctionMode

from reweight._ranks.collectives import is_sharded

Alias = Callable[[Tensor], Tensor]


class Twin(NamedTuple):
    """An optimizer like another.

    Attributes:
        optimizer: its twin.
        parameters: the twin's parameters by the id of the other's.
    """

    optimizer: optim.Optimizer
    parameters: dict[int, nn.Parameter]

    def step(self) -> None:
        """The step of the class, past the hooks of the user."""
        step = type(self.optimizer).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]
        step(self.optimizer)


def part(optimizer: optim.Optimizer, chosen: Container[int]) -> optim.Optimizer:
    """The optimizer of some of its parameters, given by their ids, in the same memory."""
    few = object.__new__(type(optimizer))
    few.__dict__.update(vars(optimizer))
    few.state, few.param_groups = copy.copy(optimizer.state), []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in chosen:
                few.state.pop(p, None)
        few.param_groups.append({name: group[name] for name in group if name != "param_names"})
        few.param_groups[-1]["params"] = [p for p in group["params"] if id(p) in chosen]
    return few


def twin(optimizer: optim.Optimizer, gradients: Mapping[int, Tensor | None], alias: Alias) -> Twin:
    """An optimizer of the same class, in the same state.

    Args:
        optimizer: which stays as it is.
        gradients: by the id of the parameter; what is not named keeps the gradient that it has.
        alias: a tensor → what stands for it, such as the same memory, or a copy.
    """
    memo: dict[int, Any] = {}
    parameters: dict[int, nn.Parameter] = {}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for old in held:
        new = nn.Parameter(alias(old), old.requires_grad)
        gradient = gradients.get(id(old), old.grad)
        if gradient is not None:  # fully_shard keeps those of many parameters in one memory
            new.grad = alias(gradient.detach().clone() if is_sharded(gradient) else gradient)
        memo[id(old)] = parameters[id(old)] = new
    copied = _Copier(alias, memo, {key: id(new) for key, new in parameters.items()})
    for old in held:
        parameters[id(old)].__dict__.update(copied(vars(old)))
    return Twin(copied(optimizer), parameters)


class _Copier:
    """Copies structure, not tensors: for those there is the alias, or what the memo has."""

    def __init__(self, alias: Alias, memo: dict[int, Any], ids: dict[int, int]) -> None:
        self._alias, self._memo, self._ids = alias, memo, ids
        self._sharing = _Sharing(alias)

    def __call__(self, value: Any) -> Any:
        if type(value) is int:
            return self._ids.get(value, value)  # state may be kept by the id of a parameter
        if value is None or isinstance(value, bool | float | str):
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = self._copy(value)
        return self._memo[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._alias(value)
        if isinstance(value, optim.Optimizer):  # whose __getstate__ leaves out what subclasses add
            return self._optimizer(value)
        if isinstance(value, dict):
            new = self._memo[id(value)] = copy.copy(value)  # a defaultdict stays one
            new.clear()
            new.update({self(key): self(each) for key, each in value.items()})
            return new
        if isinstance(value, list | deque):
            several = self._memo[id(value)] = copy.copy(value)
            several.clear()
            several.extend(self(each) for each in value)
            return several
        if type(value) in (tuple, set, frozenset):
            return type(value)(self(each) for each in value)
        try:
            with self._sharing:
                return copy.deepcopy(value, self._memo)
        except (TypeError, RuntimeError):  # a lock, a process group, …
            return value

    def _optimizer(self, optimizer: optim.Optimizer) -> optim.Optimizer:
        new = self._memo[id(optimizer)] = object.__new__(type(optimizer))
        for name, value in vars(optimizer).items():
            if name != "step":  # which schedulers put there
                new.__dict__[name] = type(value)() if "_hooks" in name else self(value)
        return new


class _Sharing(TorchFunctionMode):
    """copy.deepcopy of a tensor gives its alias."""

    def __init__(self, alias: Alias) -> None:
        super().__init__()
        self._alias = alias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[1].setdefault(id(args[0]), self._alias(args[0]))
        return func(*args, **(kwargs or {}))
