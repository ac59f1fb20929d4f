"""What is right: the hypergradient of a training set-up, by code that the package has no part in.

:func:`by_rows` needs the plain backward and nothing else: with SGD the update is θ̂ = θ − α·g, so
that with c = ∇L_meta(θ̂) after a real step

    ∂L_meta/∂w[i,k] = −α/B · ⟨ c , ∇θ l[i,k] ⟩ ,

one backward for every loss. It is what *the user's backward* does, and exact for operations that
have no second derivative too. :func:`by_differences` takes any optimizer: central differences of
L_meta around its real step, one weight after the other.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

NUM_SAMPLES = 3
"""Of every batch."""


class Training(NamedTuple):
    """What a user brings to a step.

    Attributes:
        model: called with the inputs; its outputs, by way of ``exits``, are logits [B, C].
        optimizer: any; for :func:`by_rows` SGD without momentum.
        train: inputs and target.
        meta: the same.
        exits: outputs → logits.
    """

    model: nn.Module
    optimizer: Optimizer
    train: tuple[Any, Tensor]
    meta: tuple[Any, Tensor]
    exits: Callable[[Any], Tensor] = lambda outputs: outputs

    def losses(self, batch: tuple[Any, Tensor]) -> Tensor:
        """Of a batch, shape [B, 1]."""
        inputs, target = batch
        outputs = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        return F.cross_entropy(self.exits(outputs), target, reduction="none").unsqueeze(1)


Build: TypeAlias = Callable[[torch.dtype], Training]
"""Makes one anew, always the same, but for the precision."""


class Expected(NamedTuple):
    """What is right.

    Attributes:
        value: the hypergradient, shape [B, 1].
        gradients: ``.grad`` by name, where it is known.
        scale: what a gradient that is off by 1 would change; times the precision it is the rounding
            of gradients of logits of about 1, and what is below that is 0.
        precision: of the forward, which may compute in float32 whatever it is given.
    """

    value: Tensor
    gradients: dict[str, Tensor]
    scale: float
    precision: torch.dtype


def some_weights(num_samples: int) -> Tensor:
    """Those of the step, between 0.5 and 1.5, shape [B, 1]."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num_samples, 1, generator=generator, dtype=torch.float64) + 0.5


def by_rows(build: Build, dtype: torch.dtype, weights: Tensor) -> Expected:
    """One plain backward for every loss, and one real step of SGD."""
    training = build(dtype)
    (group,) = training.optimizer.param_groups
    losses = training.losses(training.train)
    precision = _precision(losses)
    parameters = dict(training.model.named_parameters())
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    rows = [
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        for loss in losses.flatten()
    ]
    weights = weights.to(losses)
    (weights * losses).mean(0).sum().backward()
    gradients = {n: dense(p.grad) for n, p in parameters.items() if p.grad is not None}
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.losses(training.meta).mean(0).sum().backward()
    slopes, share = [], group["lr"] / len(rows)
    norms = [norm([g for g in row if g is not None]) for row in rows]
    scale = share * (norm([p.grad for p in trained if p.grad is not None]) + max(norms))
    for row in rows:
        products = [
            (dense(p.grad) * dense(g)).sum()
            for p, g in zip(trained, row, strict=True)
            if p.grad is not None and g is not None
        ]
        slopes.append(-share * sum(products, losses.new_zeros(())))
    if not gradients:
        raise ValueError("no parameter gets a gradient")
    value = torch.stack(slopes).view_as(weights).detach()
    return Expected(value, gradients, scale, precision)


def by_differences(build: Build, dtype: torch.dtype, weights: Tensor) -> Expected:
    """Central differences of L_meta around a real step, of fourth order, always in float64."""

    def meta_loss(weights: Tensor) -> Tensor:
        training = build(torch.float64)

        def closure() -> Tensor:
            training.optimizer.zero_grad()
            loss = (weights * training.losses(training.train)).mean(0).sum()
            loss.backward()
            return loss

        closure()
        training.optimizer.step(closure)
        with torch.no_grad():
            return training.losses(training.meta).mean(0).sum()

    slopes, step = [], 1e-3
    for i in range(len(weights)):
        change = torch.zeros_like(weights)
        change[i] = step
        near = meta_loss(weights + change) - meta_loss(weights - change)
        far = meta_loss(weights + 2 * change) - meta_loss(weights - 2 * change)
        slopes.append((8 * near - far) / (12 * step))
    return Expected(torch.stack(slopes).view_as(weights), {}, 0.0, dtype)


def _precision(losses: Tensor) -> torch.dtype:
    """The coarsest that anything between the parameters and the losses was computed in."""
    waiting, seen, dtypes = [losses.grad_fn], set(), {losses.dtype}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            dtypes |= {output.dtype.to_real() for output in node._input_metadata}
            waiting += [before for before, _ in node.next_functions]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(dense(tensor).norm().item() ** 2 for tensor in tensors))


def dense(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.todense() if tensor.is_sparse else tensor.clone()
