"""The forward-mode pass with less arithmetic than PyTorch's own, and the same result.

Its values are those of the first forward: a convolution or linear layer that meets the same bytes
again is not computed again. What is left of it are the products of the tangents.
The tangent of BatchNorm is its backward: with y = γ·x̂ + β, x̂ = (x − mean) / std per channel,

    ∂y/∂x = γ/std · (I − 1·1ᵀ/n − x̂·x̂ᵀ/n)

is symmetric, so that ẏ = (∂y/∂x)ᵀ·ẋ + γ̇·x̂ + β̇ takes one fused kernel and one pass; LayerNorm's is,
but for γ, symmetric for each sample.

All of this on the CPU; elsewhere, and in every other case, PyTorch's own forward mode runs.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from reweight._passes.custom_functions import applied_by
from reweight._passes.ladder import GRADIENTS, Ladder
from reweight._passes.operations import dual, unpack
from reweight._passes.primal_cache import (
    PRODUCTS,
    PrimalCache,
    Product,
    is_large_product,
    is_plain,
)
from reweight._passes.tangent_rules import RULES


class TangentsWithGradients(TorchFunctionMode):
    """Cuts tangents where ``torch.no_grad`` cuts gradients."""

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, without tangents if it is without gradients."""
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


class _ForwardMode(TangentsWithGradients):
    """Forward mode by the rules of this module where they apply, and by the ladder's other ways."""

    def __init__(self, cache: PrimalCache, ladder: Ladder) -> None:
        super().__init__()
        self._cache, self._ladder = cache, ladder
        self._handlers: dict[Any, Callable[..., Any]] = {
            **{func: partial(self._product, func) for func in PRODUCTS},
            **_RULES,
            **{func: partial(ladder.gradient, func) for func in GRADIENTS},
            F.multi_head_attention_forward: self._attention_layer,
            **ladder.handlers(),
        }

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, by its rule if it has one."""
        if not torch.is_grad_enabled():
            return super().__torch_function__(func, classes, args, kwargs)
        kwargs = kwargs or {}
        try:
            if func in self._handlers:
                result = self._handlers[func](*args, **kwargs)
                if result is not None:
                    return result
            result = func(*args, **kwargs)
        except Exception as error:
            self._ladder.descend(func, args, kwargs, error)
        if type(func) not in _OWN_KINDS:
            self._ladder.require_tangents(func, args, kwargs, result)
        return result

    def _attention_layer(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return _attention_layer(*args, **kwargs)

    def _product(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        if not is_large_product(func, args):
            return None
        product = Product.of(func, *args, **kwargs)
        if not all(map(_is_constant, product.tensors)):
            return None
        if product.func is F.linear:  # strided input would take a copy of the weight per sample
            product = product._replace(
                tensors=(product.tensors[0].contiguous(), *product.tensors[1:])
            )
        (x, dx), (weight, dweight), (bias, dbias) = map(unpack, product.tensors)
        if dweight is None and (dx is None or dbias is not None):
            return None
        value = self._cache.recall(product._replace(tensors=(x, weight, bias)))
        if value is None:
            value = product(x, weight, bias)
        tangent = None if dweight is None else product(x, dweight, dbias)
        if dx is not None:
            tangent = _sum(tangent, product, dx, weight)
        return value if tangent is None else dual(value, tangent)


def _sum(tangent: Tensor | None, product: Product, dx: Tensor, weight: Tensor) -> Tensor:
    if tangent is None:
        return product(dx, weight, None)
    in_place = product.func is F.linear and weight.dim() == 2
    if in_place and tangent.dtype == dx.dtype == weight.dtype:
        rows = tangent.view(-1, tangent.shape[-1])
        rows.addmm_(dx.reshape(-1, dx.shape[-1]), weight.mT)  # without a tensor in between
        return tangent
    return tangent.add_(product(dx, weight, None))


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
    if not training or not all(map(_is_constant, tensors)):
        return None
    (x, dx), (weight, dweight), (bias, dbias) = map(unpack, tensors)
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
    return dual(value, tangent)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The same, with statistics of each sample: ẏ = γ·(∂x̂/∂x)ᵀ·ẋ + γ̇·x̂ + β̇."""
    tensors = (input, weight, bias)
    # The kernels take two dtypes, as autocast gives them, forward but not backward.
    mixed = any(each is not None and each.dtype != input.dtype for each in (weight, bias))
    if mixed or not all(map(_is_constant, tensors)):
        return None
    (x, dx), (weight, dweight), (bias, dbias) = map(unpack, tensors)
    if dx is None or (dweight is None) != (dbias is None):
        return None
    shape, x, dx = list(normalized_shape), x.contiguous(), dx.contiguous()  # or each kernel does so
    value, mean, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
    tangent = torch.ops.aten.native_layer_norm_backward(
        dx, x, shape, mean, inverse, None, None, [True, False, False]
    )[0]
    if weight is not None:
        tangent *= weight
    if dweight is not None:
        tangent += torch.native_layer_norm(x, shape, dweight, dbias, eps)[0]
    return dual(value, tangent)


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
    """P·v with P = softmax(s·q·kᵀ), whose tangent is its backward: it is symmetric too."""
    tensors = (query, key, value)
    special = attn_mask is not None or dropout_p or enable_gqa or torch.is_autocast_enabled("cpu")
    if special or not all(map(_is_constant, tensors)):
        return None
    (q, dq), (k, dk), (v, dv) = map(unpack, tensors)
    if dq is None or dk is None or dv is None or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        # Bitwise that of the first forward, or nothing after it would be recalled.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, dq, k, dk, v, dv = (
        tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, dq, k, dk, v, dv)
    )
    zero = q.new_zeros(())
    scores = torch.baddbmm(zero, q, k.mT, beta=0, alpha=factor)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores.masked_fill_(later, -torch.inf)
    shares = scores.softmax(-1)
    slope = torch.baddbmm(zero, dq, k.mT, beta=0, alpha=factor).baddbmm_(q, dk.mT, alpha=factor)
    change = torch.ops.aten._softmax_backward_data(slope, shares, -1, shares.dtype)
    tangent = (change @ v).baddbmm_(shares, dv)
    return dual(mixed, tangent.view_as(mixed))


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    **RULES,
}

_OWN_KINDS = {
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
}
"""Of PyTorch's own functions: those that lose tangents are known by name."""

_attention_layer = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's own, but as a mode sees it: the functions that it calls, instead of the whole."""


def _is_constant(tensor: Tensor | None) -> bool:
    """Whether the rules may take it: a dual number of theirs ends the graph of an inner gradient.

    The model makes such a graph when it takes a gradient in its forward, of an energy for example.
    """
    return is_plain(tensor) and (tensor is None or not tensor.requires_grad)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain operations: fused kernels have no forward mode and no double backward."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def tangents_follow_gradients(cache: PrimalCache, ladder: Ladder) -> Iterator[None]:
    """For forwards with dual numbers: plain attention, no tangent through ``torch.no_grad``."""
    with plain_attention(), _ForwardMode(cache, ladder), applied_by(ladder.apply):
        yield


@functools.cache
def load_forward_mode() -> None:
    """What PyTorch loads at the first use of forward mode warns of a deprecation of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
