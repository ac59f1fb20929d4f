"""The tangent of one call, of an operation for which PyTorch has no forward rule.

Either way runs the call once on its values, so that random state, buffers and arguments that it
changes are left as after any call.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from reweight._passes.random_state import RandomState

_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_DOUBLE |= dict.fromkeys((torch.float16, torch.bfloat16), torch.float64)


class NoDerivativeError(Exception):
    """The way to the tangent that was tried is not there."""


def unpack(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    """Value and tangent, None where there is none."""
    return (None, None) if tensor is None else forward_ad.unpack_dual(tensor)


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Both in one tensor."""
    result: Tensor = forward_ad.make_dual(value, tangent)
    return result


def is_continuous(value: Any) -> bool:
    """Whether it is a tensor that may have a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def have_tangents(values: Iterable[Any]) -> bool:
    """Whether any of them is a dual number."""
    return any(is_continuous(value) and unpack(value)[1] is not None for value in values)


def by_backward(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call, with tangents by its own backward.

    The backward g(u) = (∂y/∂x)ᵀ·u is linear in u, so that its own backward is (∂y/∂x)·ẋ. What comes
    is what the backward takes for the derivative, whether or not it is the forward's.

    Raises:
        NoDerivativeError: the backward cannot be differentiated.
    """
    call = _Call(func, args, kwargs)
    outputs = list(call.run().values())
    try:
        return call.result(_backward_of_backward(outputs, call.inputs, call.directions))
    except Exception as error:
        raise NoDerivativeError(str(error)) from error


def _backward_of_backward(
    outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor]
) -> list[Tensor]:
    if not any(y.numel() for y in outputs):  # as of checkpointing, which only keeps its inputs
        return [torch.zeros_like(y) for y in outputs]

    leaves = [_generic_like(y).requires_grad_() for y in outputs]
    cotangents = [leaf.view_as(leaf) for leaf in leaves]  # a backward may give them as they are
    gradients = torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=True, allow_unused=True
    )
    pairs = []
    for gradient, direction in zip(gradients, directions, strict=True):
        if gradient is not None and _leads_to(gradient, leaves):
            pairs.append((gradient, direction))
        elif gradient is not None and bool(gradient.any()):  # or it is 0 everywhere
            raise NoDerivativeError("Its backward has no graph.")
    if not pairs:
        return [torch.zeros_like(y) for y in outputs]
    tangents = torch.autograd.grad(
        [g for g, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True
    )
    return [
        torch.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, tangents, strict=True)
    ]


def _leads_to(tensor: Tensor, leaves: list[Tensor]) -> bool:
    """Whether the graph of the tensor reaches any of the leaves."""
    wanted, seen, nodes = {id(leaf) for leaf in leaves}, set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _generic_like(tensor: Tensor) -> Tensor:
    """Where a linear function is not 0 by chance, nor divides by 0; without a random number."""
    numbers = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float64)
    return numbers.cos().to(tensor.dtype).view(tensor.shape)


def by_differences(func: Callable[..., Any], args: Any, kwargs: Any, *, double: bool) -> Any:
    """The call, with tangents by a central difference of it alone.

    In float64 the difference is off by about 1e-10 of itself; the precision of the call is for
    operations that know no other.

    Raises:
        NoDerivativeError: the operation does not compute in float64.
    """
    call = _Call(func, args, kwargs)
    dtypes = [torch.float64 if double else x.dtype for x in call.inputs]
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    step = precision ** (1 / 3) * _length(call.inputs) / _length(call.directions)
    step = torch.where(step.isfinite() & (step > 0), step, 1)
    try:
        above, below = (call.at(sign * step, double) for sign in (1, -1))
    except Exception as error:
        raise NoDerivativeError(str(error)) from error
    tangents = []
    for place, y in call.run().items():
        if torch.finfo(above[place].dtype).eps > precision:
            raise NoDerivativeError("It computes in another precision than it gets.")
        slope = (above[place] - below[place]) / (2 * step)
        tangents.append(slope.to(y.dtype))
    return call.result(tangents)


def _length(tensors: list[Tensor]) -> Tensor:
    lengths = [tensor.detach().abs().double().norm() for tensor in tensors]
    result: Tensor = torch.stack(lengths).norm()
    return result


class _Call:
    """A call that can be run with a graph from what has tangents, and at other values.

    Args:
        func: what is called.
        args: its arguments; tensors may be in containers.
        kwargs: those by name.

    Attributes:
        inputs: values of the arguments that have tangents; each tensor once.
        directions: those tangents.
    """

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._func = func
        self._leaves, self._structure = tree_flatten((tuple(args), dict(kwargs or {})))
        self._tensors = {id(leaf): leaf for leaf in self._leaves if isinstance(leaf, Tensor)}
        pairs = {key: unpack(t) for key, t in self._tensors.items() if is_continuous(t)}
        self._moving = [key for key, (_, tangent) in pairs.items() if tangent is not None]
        self.inputs = [pairs[key].primal for key in self._moving]  # type: ignore[attr-defined]
        self.inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in self.inputs]
        self.directions: list[Tensor] = [pairs[key][1] for key in self._moving]  # type: ignore[misc]
        self._has_graph = any(t.requires_grad for t in self._tensors.values())

    def run(self) -> dict[Any, Tensor]:
        """Once, with a graph: results and changed arguments that depend on the inputs, by place."""
        tensors = {
            key: tensor if tensor.requires_grad else tensor.detach()
            for key, tensor in self._tensors.items()
        }
        # An operation that works in place can take no leaf.
        tensors |= {key: x.clone() for key, x in zip(self._moving, self.inputs, strict=True)}
        self._originals = {id(tensors[key]): self._tensors[key] for key in tensors}
        self._result, places = self._called(tensors)
        found = {p: t for p, t in places.items() if is_continuous(t) and t.requires_grad}
        self._outputs = list(found.values())
        return found

    def at(self, step: Tensor, double: bool) -> dict[Any, Tensor]:
        """All that comes of it, by place, that many tangents away; nothing is changed by it."""

        def raised(value: Tensor) -> Tensor:
            return value.to(_DOUBLE.get(value.dtype, value.dtype)) if double else value

        with torch.no_grad():
            tensors = {key: raised(t.detach()).clone() for key, t in self._tensors.items()}
            for key, x, dx in zip(self._moving, self.inputs, self.directions, strict=True):
                value = raised(x.detach())
                tensors[key] = value + (step * raised(dx)).to(value.dtype)
            devices = {t.device for t in tensors.values()}
            generators = [leaf for leaf in self._leaves if isinstance(leaf, torch.Generator)]
            random_state = RandomState(devices, generators)
            try:
                return self._called(tensors)[1]
            finally:
                random_state.restore()

    def result(self, tangents: list[Tensor]) -> Any:
        """What the call returns and what it changed, with these tangents of its outputs."""
        duals = {
            id(y): dual(y if self._has_graph else y.detach(), dy)
            for y, dy in zip(self._outputs, tangents, strict=True)
        }
        for key, original in self._originals.items():
            if key in duals:
                original.copy_(duals[key])
        duals |= self._originals
        return tree_map(lambda leaf: duals.get(id(leaf), leaf), self._result)

    def _called(self, tensors: Mapping[int, Tensor]) -> tuple[Any, dict[Any, Tensor]]:
        """The result, and what it consists of, and the arguments that were changed, by place."""
        before = {key: _version(tensor) for key, tensor in tensors.items()}
        args, kwargs = tree_unflatten(
            [tensors.get(id(leaf), leaf) for leaf in self._leaves], self._structure
        )
        result = self._func(*args, **kwargs)
        places: dict[Any, Tensor] = {
            key: tensor for key, tensor in tensors.items() if _version(tensor) != before[key]
        }
        seen = {id(tensor) for tensor in tensors.values()}
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and id(leaf) not in seen:
                places["result", place] = leaf
                seen.add(id(leaf))
        return result, places


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
