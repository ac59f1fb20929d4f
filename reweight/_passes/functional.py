"""Tensors in the place of a model's own."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.func import functional_call

T = TypeVar("T")


def by_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by every name they go by, but each place in the model named only once.

    A module that is shared has its tensors in one place, by several names. Were they given by all,
    ``functional_call`` would leave them there for good.
    """
    own = [*model.named_parameters(), *model.named_buffers()]
    given = {id(tensor): tensors[name] for name, tensor in own if name in tensors}
    return {
        f"{prefix}.{name}" if prefix else name: given[id(tensor)]
        for prefix, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if id(tensor) in given
    }


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], run: Callable[[], T]) -> T:
    """Runs it with these tensors in the place of the model's own of those names."""
    named = {f"model.{name}": tensor for name, tensor in by_place(model, tensors).items()}
    result: T = functional_call(_Holder(model), named, (run,), tie_weights=False)
    return result


class _Holder(nn.Module):
    """Runs what it is given, so that parameters of the model are in place meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()
