"""What finite differences must know of a forward: cuts from the graph, and its precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reweight._passes.ladder import GRADIENTS, Ladder


class DifferenceWatch(TorchFunctionMode):
    """Notices what differences must know of the block: cuts from the graph, and low precision.

    Attributes:
        precision: spacing of the coarsest numbers.
        cuts: what each tensor sums to that is cut from the graph. It matters if it moves with the
            parameters, as rotary embeddings, for one, do not.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        self._ladder, self.precision = ladder, 0.0
        self._without_graph = False  # by no_grad, and not inside of a custom Function
        self.cuts: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function; looks at which it is, and at what it gives."""
        if func in GRADIENTS:
            return self._ladder.gradient(func, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._without_graph = args == (False,)
        if isinstance(result, Tensor) and result.is_floating_point():
            if func in _CUTS or self._without_graph:
                wide = torch.float32 if result.device.type == "mps" else torch.float64
                self.cuts.append(result.detach().sum(dtype=wide))
            self.precision = max(self.precision, torch.finfo(result.dtype).eps)
        return result


_CUTS = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    torch.detach_,
    Tensor.data.__get__,  # type: ignore[attr-defined]
)


def differ(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether cuts in two forwards came to different sums; waits for the device."""
    if len(some) != len(others):
        return True
    return any(not torch.equal(one, other) for one, other in zip(some, others, strict=True))


def working_precision(parameters: Mapping[str, Tensor]) -> float:
    """The coarsest spacing of the numbers a forward computes with, as far as one can know."""
    dtypes = {parameter.dtype for parameter in parameters.values()}
    devices = {parameter.device.type for parameter in parameters.values()}
    dtypes |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
