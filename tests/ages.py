"""Parameters of different ages, as an optimizer holds them, and how many operations are run."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from reweight._optimizers.pseudo_update import pseudo_update


class Operations(TorchDispatchMode):
    """Counts what is no view and more than memory."""

    def __init__(self) -> None:
        super().__init__()
        self.num = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.num[str(func)] += not (is_view or "empty" in str(func))
        return func(*args, **(kwargs or {}))


class OfAges:
    """Parameters that have been through steps of one optimizer, each through some of them."""

    SHAPES = ((3, 4), (5,), (7, 2), (1,))

    def __init__(
        self,
        kind: type[optim.Optimizer],
        dtype: torch.dtype,
        num_parameters: int = 8,
        **options: Any,
    ) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(0), dtype
        shapes = [self.SHAPES[i % len(self.SHAPES)] for i in range(num_parameters)]
        self.parameters = [nn.Parameter(self._drawn(shape)) for shape in shapes]
        self.optimizer = kind(self.parameters, lr=0.1, **options)
        for step in range(1, 9):
            for i, p in enumerate(self.parameters):
                p.grad = self._drawn(p.shape) if step > i % 4 else None
            self.optimizer.step()
        self.gradients = [self._drawn(p.shape).requires_grad_() for p in self.parameters]

    def _drawn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self._dtype)

    def ahead(self) -> list[Tensor]:
        """θ̂."""
        named: dict[str, Tensor] = {str(i): p for i, p in enumerate(self.parameters)}
        gradients = {str(i): g for i, g in enumerate(self.gradients)}
        return list(pseudo_update([self.optimizer], named, gradients).parameters.values())

    def slopes(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """θ̂ and ∂θ̂/∂g."""
        moved = self.ahead()
        return moved, torch.autograd.grad(moved, self.gradients, list(map(torch.ones_like, moved)))

    def own(self) -> list[Tensor]:
        """θ after the class's own step, which is taken."""
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g.detach().clone()
        self.optimizer.step()
        return [p.detach() for p in self.parameters]
