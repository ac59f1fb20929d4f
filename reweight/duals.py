"""The forward-mode pass with less arithmetic than PyTorch's own, and the same result.

Its values are those of the first forward: a convolution or linear layer that meets the same bytes
again is not computed again (:class:`Values`). What is left of it are the products of the tangents.
The tangent of BatchNorm is its backward: with y = γ·x̂ + β, x̂ = (x − mean) / std per channel,

    ∂y/∂x = γ/std · (I − 1·1ᵀ/n − x̂·x̂ᵀ/n)

is symmetric, so that ẏ = (∂y/∂x)ᵀ·ẋ + γ̇·x̂ + β̇ takes one fused kernel and one pass.

All of this on the CPU; elsewhere, and in every other case, PyTorch's own forward mode runs.
"""

import functools
import types
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reweight.forwards import plain_attention

_PRODUCTS = {
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
"""(input, weight, bias, ...) → input · weight + bias, linear in each."""

_WORTH_RECALLING = 1 << 14  # elements; below, looking costs as much as computing


class Values(TorchFunctionMode):
    """What the products of a forward came to: as a context it takes note, then it is asked.

    A result is given back only for the very same bytes of input, weight and bias, so it is bitwise
    what the product would be, whatever the model does meanwhile. Nothing is kept alive for that:
    tensors that the graph of the losses does not hold, or that were changed in place since, are
    forgotten.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Any, deque[_Call]] = defaultdict(deque)

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function; takes note of it if it is a product."""
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and result.requires_grad and result.numel() >= _WORTH_RECALLING:
            product = _Product.of(func, *args, **(kwargs or {}))
            # Linear layers take strided input one way with a graph, and another way without.
            strided = func is F.linear and not product.tensors[0].is_contiguous()
            if all(map(_is_plain, product.tensors)) and not strided:
                tensors = [None if t is None else _Trace(t) for t in product.tensors]
                call = _Call(tensors, product.settings, _Trace(result))
                self._calls[func, product.tensors[1].data_ptr()].append(call)
        return result

    def recall(self, product: "_Product") -> Tensor | None:
        """The value of the product if it was computed before and is still there, or None."""
        calls = self._calls.get((product.func, product.tensors[1].data_ptr()))
        if not calls:
            return None
        call = calls.popleft()
        if call.settings != product.settings:
            return None
        same = all(map(_same_bytes, (t and t() for t in call.tensors), product.tensors))
        return call.result() if same else None


class _Product(NamedTuple):
    """A product to compute: its input, weight and bias, and all that it depends on besides."""

    func: Callable[..., Tensor]
    tensors: tuple[Tensor, Tensor, Tensor | None]
    settings: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> "_Product":
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return cls(func, (input, weight, bias), (rest, named, autocast))

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rest, named, _ = self.settings
        return self.func(input, weight, bias, *rest, **named)


class _Call(NamedTuple):
    tensors: "list[_Trace | None]"
    settings: tuple[Any, ...]
    result: "_Trace"


class _Trace:
    """Finds a tensor again, as long as something else keeps it alive and as it was.

    A view is found through its base, which a graph that holds any view of it keeps alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        base = tensor if tensor._base is None else tensor._base
        self._base, self._version, self._dtype = weakref.ref(base), base._version, tensor.dtype
        self._place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def __call__(self) -> Tensor | None:
        base = self._base()
        if base is None or base._version != self._version or base.dtype != self._dtype:
            return None
        return base.detach().as_strided(*self._place)


def _is_plain(tensor: Tensor | None) -> bool:
    kinds = (Tensor, torch.nn.Parameter)
    return tensor is None or (
        type(tensor) in kinds
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _same_bytes(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.size() != other.size() or one.stride() != other.stride():
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(_words(one), _words(other))


def _words(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as integers, so that NaN is NaN and 0 is not −0; large for speed."""
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    size = tensor.element_size()
    if dense and tensor.numel() * size % 8 == 0 == tensor.storage_offset() * size % 8:
        flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        return flat.view(torch.int64)
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


class _ForwardMode(TorchFunctionMode):
    """Forward mode by the rules of this module, where they apply."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function; without tangents under ``torch.no_grad``, as in backward."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        result = None
        if func in _PRODUCTS:
            result = self._product(_Product.of(func, *args, **kwargs))
        elif func in _RULES:
            result = _RULES[func](*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            with self:
                return _attention_layer(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def _product(self, product: _Product) -> Tensor | None:
        if not all(map(_is_plain, product.tensors)):
            return None
        if product.func is F.linear:  # strided input would take a copy of the weight per sample
            product = product._replace(
                tensors=(product.tensors[0].contiguous(), *product.tensors[1:])
            )
        (x, dx), (weight, dweight), (bias, dbias) = map(_unpack, product.tensors)
        if dweight is None and (dx is None or dbias is not None):
            return None
        value = self._values.recall(product._replace(tensors=(x, weight, bias)))
        if value is None:
            value = product(x, weight, bias)
        terms = [] if dweight is None else [product(x, dweight, dbias)]
        if dx is not None:
            terms.append(product(dx, weight, None))
        return forward_ad.make_dual(value, functools.reduce(Tensor.add_, terms))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    tensors = (input, weight, bias)
    if not training or not all(map(_is_plain, tensors)):
        return None
    (x, dx), (weight, dweight), (bias, dbias) = map(_unpack, tensors)
    if dx is None or (dweight is None) != (dbias is None):
        return None
    value, mean, inverse = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    tangent = torch.ops.aten.native_batch_norm_backward(
        dx, x, weight, None, None, mean, inverse, training, eps, [True, False, False]
    )[0]
    if dweight is not None:
        # γ̇·x̂ + β̇, by the kernel of the evaluation mode with the statistics of this batch.
        tangent += torch.native_batch_norm(
            x, dweight, dbias, mean, inverse.pow(-2), False, 0.0, 0.0
        )[0]
    return forward_ad.make_dual(value, tangent)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """P·v with P = softmax(s·q·kᵀ), whose Jacobian is symmetric too: its tangent is its backward."""
    tensors = (query, key, value)
    special = attn_mask is not None or dropout_p or enable_gqa or torch.is_autocast_enabled("cpu")
    if special or not all(map(_is_plain, tensors)):
        return None
    (q, dq), (k, dk), (v, dv) = map(_unpack, tensors)
    if dq is None or dk is None or dv is None:
        return None
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, dq = q * factor, dq * factor
    scores = q @ k.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores.masked_fill_(later, -torch.inf)
    shares = scores.softmax(-1)
    change = torch.ops.aten._softmax_backward_data(
        (dq @ k.mT).add_(q @ dk.mT), shares, -1, shares.dtype
    )
    return forward_ad.make_dual(shares @ v, (change @ v).add_(shares @ dv))


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
}

_attention_layer = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's own, but as a mode sees it: the functions that it calls, instead of the whole."""


def _unpack(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    return (None, None) if tensor is None else forward_ad.unpack_dual(tensor)


@contextmanager
def tangents_follow_gradients(values: Values) -> Iterator[None]:
    """For forwards with dual numbers: plain attention, no tangent through ``torch.no_grad``."""
    with plain_attention(), _ForwardMode(values):
        yield


@functools.cache
def load_forward_mode() -> None:
    """What PyTorch loads at the first use of forward mode warns of a deprecation of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
