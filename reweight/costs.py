"""What an answer at each exit costs, in multiply-adds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from reweight._passes.attention import plain_attention
from reweight._passes.forward import call

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def exit_costs(
    model: nn.Module,
    inputs: Any,
    exits: Callable[[Any], Sequence[Tensor]] | None = None,
    *,
    in_order: bool = False,
    custom_mapping: dict[Any, Any] | None = None,
) -> list[int]:
    """Multiply-adds of an answer at each exit, all earlier exits included.

    Convolutions, products of matrices and attention count, as in ``torch.utils.flop_counter``,
    which reports two operations for each multiply-add; everything else costs nothing. Attention and
    recurrent layers are run as the products they are made of, since fused kernels are not counted.

    Args:
        model: called once as ``model(inputs)``, in evaluation mode, without gradients.
        inputs: a batch, in any form that a step takes; the cost is that of the whole of it, so pass
            one sample.
        exits: takes the list of K logits out of what the model returns; None if it is that list.
        in_order: False counts the operations that the logits of the first k exits depend on. True
            counts everything that ran before the logits of exit k were there, the convention of the
            published MSDNet and RANet figures; the model must then compute its exits one by one.
        custom_mapping: formulas for further operations, handed to ``FlopCounterMode``.

    Returns:
        K numbers that do not decrease.

    Raises:
        TypeError: the model does not return a list or tuple of tensors, and no ``exits`` is given.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        ...         self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         early = self.stem(x).relu()
        ...         late = self.body(early).relu()
        ...         return [self.head(early), self.last(late)]
        >>> exit_costs(Net(), torch.zeros(1, 4))
        [48, 128]
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where there is one

    training = [module for module in model.modules() if module.training]
    counter = FlopCounterMode(display=False, custom_mapping=custom_mapping)
    recorder = _DependencyRecorder(counter)
    model.eval()
    try:
        with torch.no_grad(), plain_attention(), _plain_recurrence(), counter, recorder:
            outputs = call(model, inputs)
            logits = outputs if exits is None else exits(outputs)
    finally:
        for module in training:
            module.training = True
    if not isinstance(logits, list | tuple) or not all(isinstance(z, Tensor) for z in logits):
        raise TypeError(
            f"`model` must return a list or tuple of tensors, one for each exit, got "
            f"{type(logits).__name__}. Pass `exits=`, a function that takes them out."
        )
    needed, costs = 0, []
    for exit_logits in logits:
        needed |= recorder.needed_by(exit_logits)
        executed = (1 << needed.bit_length()) - 1
        costs.append(recorder.flops(executed if in_order else needed) // 2)
    return costs


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    (enabled, *_) = torch.backends.mkldnn.set_flags(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(enabled)


class _DependencyRecorder(TorchDispatchMode):
    """Writes down what every operation cost and which earlier ones its result rests on.

    A set of operations is an integer, operation i being bit i. Sets are kept by storage, so that
    views and in-place operations are seen through.
    """

    def __init__(self, counter: "FlopCounterMode") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self._costs: list[int] = []
        self._needed: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no storage's address is used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        needed = 1 << len(self._costs)
        self._costs.append(self._counter.get_total_flops() - before)
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor):
                needed |= self.needed_by(tensor)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                self._needed[tensor.untyped_storage()._cdata] = needed
                self._alive.append(tensor)
        return result

    def needed_by(self, tensor: Tensor) -> int:
        return self._needed.get(tensor.untyped_storage()._cdata, 0)

    def flops(self, operations: int) -> int:
        return sum(cost for i, cost in enumerate(self._costs) if operations >> i & 1)
