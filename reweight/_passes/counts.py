"""Numbers of batches that nobody looks at: what BatchNorm adds to them stays on the host."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Count(Tensor):
    """A copy of a whole number that is made, and added to, when something asks for it.

    In a pass whose buffers are thrown away mostly nothing does, and a GPU is spared an operation
    for each layer.
    """

    _added: int | None  # since; None once it is a copy

    @classmethod
    def of(cls, number: Tensor) -> "Count":
        """One that is this, as it is now; that must not change before it has been asked for."""
        count = number.as_subclass(cls)
        count._added = 0
        return count

    def add_(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor; a number is kept in mind."""
        if self._added is None or kwargs or [type(each) for each in args] != [int]:
            return super().add_(*args, **kwargs)
        self._added += args[0]
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function on the number that it has come to, a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(_plain, (args, kwargs or {}))
            return func(*args, **kwargs)


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, Count):
        return leaf
    if leaf._added is not None:
        leaf.data, leaf._added = leaf.clone().add_(leaf._added), None
    return leaf.as_subclass(Tensor)
