"""A function that someone wrote, as a net: its sample inputs become parameters."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from databases.oracles import NUM_SAMPLES, Training

NUM_CLASSES, NUM_FEATURES = 3, 2


class Called(nn.Module):
    """x [B, 2] → logits [B, 3], by way of one call of the function for each sample.

    Every floating-point tensor t among the arguments is moved by the sample and by parameters a, b
    of its shape: t + s·(a·x[0] + b·x[1]) with s = |t|/10, or 1/10 where t is 0, so that positive
    numbers stay positive; 100 times less where that leaves the function's domain. What the function
    returns goes through a fixed random projection.

    Args:
        function: takes the arguments.
        arguments: any nest of tensors and other things.
        chosen: which tensors are moved.
        module: what the function calls, if that has parameters of its own.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Any,
        chosen: Callable[[Tensor], bool] = lambda tensor: tensor.is_floating_point(),
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.function, self.module = function, module
        leaves, self.spec = tree_flatten(arguments)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and chosen(leaf):
                for parameters in (self.a, self.b):
                    # Complex parameters are refused: real ones move both of its parts.
                    initial = torch.randn(leaf.shape, dtype=leaf.real.dtype)
                    parameters[str(i)] = nn.Parameter(initial)
        # Copies: some functions change what they are given.
        self.leaves = copy.deepcopy(tree_map_only(Tensor, torch.detach, leaves))
        with torch.no_grad():
            self.size = 0.1
            if not self._outputs(torch.ones(NUM_FEATURES)).isfinite().all():
                self.size = 0.001
            flat = self._outputs(torch.zeros(NUM_FEATURES))
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(len(flat), NUM_CLASSES, generator=generator, dtype=torch.float64)
        size = flat.double().norm().clamp(min=1e-3)
        # Logits of about 1, whatever the size of the outputs.
        self.register_buffer("projection", (projection / size).to(flat.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 3]."""
        return torch.stack([self._outputs(row) @ self.projection for row in x])

    def _outputs(self, row: Tensor) -> Tensor:
        """All floating-point numbers that the function returns, in one vector."""
        leaves = list(self.leaves)
        for key, a in self.a.items():
            tensor = leaves[int(key)]
            size = self.size * torch.where(tensor == 0, 1, tensor.abs())
            size = torch.where(tensor.isfinite(), size, 0)
            change = size * (a * row[0] + self.b[key] * row[1])
            if tensor.is_complex():
                change = torch.complex(change, change)
            leaves[int(key)] = tensor + change
        parts = []
        for part in tree_leaves(self.function(tree_unflatten(leaves, self.spec))):
            if isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex()):
                part = part.to_dense() if part.layout != torch.strided else part
                part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
                parts.append(part.flatten())
        dtype = next(self.parameters()).dtype
        return torch.cat([part.to(dtype) for part in parts])


def training_of(model: nn.Module, dtype: torch.dtype) -> Training:
    """Three samples of two features to train on, and three others to judge by."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(2):
        x = torch.rand(NUM_SAMPLES, NUM_FEATURES, generator=generator, dtype=torch.float64)
        target = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
        batches.append((x.to(dtype), target))
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.01), *batches)
