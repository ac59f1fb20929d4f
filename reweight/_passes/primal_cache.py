"""The values of a forward, for the pass that needs them again: they are not computed twice."""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS: set[Callable[..., Tensor]] = {
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
"""(input, weight, bias, ...) → input · weight + bias, linear in each."""

_UNSEEN = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
}
"""Ways to memory by which it may be changed without a trace: the version of the tensor stays."""

_LARGE = 1 << 14  # elements; below, Python costs more than the arithmetic it saves


class PrimalCache(TorchFunctionMode):
    """What the products of a forward came to: as a context it takes note, then it is asked.

    A result is given back only for the very same bytes of input, weight and bias, so it is bitwise
    what the product would be, whatever the model does meanwhile. Nothing is kept alive for that:
    tensors that the graph of the losses does not hold, or that were changed in place since, or may
    have been by way of ``.data``, NumPy or an address, are forgotten. Only what the loss function
    does by such a way, or someone between two calls, is not seen. What is given back is a copy, so
    that the graph stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Any, deque[_Call]] = defaultdict(deque)

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function; takes note of it if it is a product."""
        if func in _UNSEEN:
            self._forget(args[0])
        result = func(*args, **(kwargs or {}))
        if is_large_product(func, args) and result.requires_grad:
            product = Product.of(func, *args, **(kwargs or {}))
            # Linear layers take strided input one way with a graph, and another way without.
            strided = func is F.linear and not product.tensors[0].is_contiguous()
            if all(map(is_plain, product.tensors)) and not strided:
                tensors = [None if t is None else _Trace(t) for t in product.tensors]
                call = _Call(tensors, product.settings, _Trace(result))
                self._calls[func, product.tensors[1].data_ptr()].append(call)
        return result

    def recall(self, product: "Product") -> Tensor | None:
        """The value of the product if it was computed before and is still there, or None."""
        calls = self._calls.get((product.func, product.tensors[1].data_ptr()))
        if not calls:
            return None
        call = calls.popleft()
        if call.settings != product.settings:
            return None
        same = all(map(_same_bytes, call.tensors, product.tensors))
        value = call.result() if same else None
        return None if value is None else value.clone()

    def _forget(self, tensor: Tensor) -> None:
        """Forget the results in the memory of this tensor."""
        if not is_plain(tensor):
            return
        for call in chain.from_iterable(self._calls.values()):
            if call.result.shares_memory_with(tensor):
                call.result.forget()

    def follow(self, copies: Mapping[int, Tensor]) -> None:
        """Look for weights and biases in these copies from now on, by the id of what was copied."""
        calls = [(func, call) for (func, _), queue in self._calls.items() for call in queue]
        self._calls.clear()
        for func, call in calls:
            for trace in filter(None, call.tensors[1:]):
                trace.follow(copies)
            weight = None if call.tensors[1] is None else call.tensors[1]()
            if weight is not None:
                self._calls[func, weight.data_ptr()].append(call)


class Product(NamedTuple):
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
    ) -> "Product":
        """A call of one of ``PRODUCTS``."""
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return cls(func, (input, weight, bias), (rest, named, autocast))

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same product of other tensors."""
        rest, named, _ = self.settings
        return self.func(input, weight, bias, *rest, **named)


def is_large_product(func: Any, args: Any) -> bool:
    """Whether it is a product that is worth a look, with the input as its first argument."""
    return func in PRODUCTS and len(args) > 1 and args[0].numel() >= _LARGE


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
        if base.untyped_storage().size() == 0:  # a parameter that was gathered, and let go of
            return None
        return base.detach().as_strided(*self._place)

    def shares_memory_with(self, tensor: Tensor) -> bool:
        """Whether it is, or was, in the same memory."""
        base = self._base()
        return base is not None and _memory(base) == _memory(tensor)

    def forget(self) -> None:
        """Find it no more."""
        self._version = -1

    def follow(self, copies: Mapping[int, Tensor]) -> None:
        """Find the same place of a copy, if it was copied as it is."""
        base = self._base()
        copy = None if base is None else copies.get(id(base))
        if copy is not None and base is not None and copy.stride() == base.stride():
            self._base, self._version = weakref.ref(copy), copy._version


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is an ordinary tensor on the CPU, or none at all."""
    kinds = (Tensor, torch.nn.Parameter)
    return tensor is None or (
        type(tensor) in kinds
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.is_inference() or tensor.is_neg() or tensor.is_conj())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _same_bytes(trace: _Trace | None, other: Tensor | None) -> bool:
    if trace is None or other is None:
        return trace is None and other is None
    one = trace()
    if one is None:
        return False
    if one.dtype != other.dtype or one.size() != other.size() or one.stride() != other.stride():
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(_words(one), _words(other))


def _words(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as integers, so that NaN is NaN and 0 is not −0; large for speed."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    size = tensor.element_size()
    if dense and tensor.numel() * size % 8 == 0 == tensor.storage_offset() * size % 8:
        flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        return flat.view(torch.int64)
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
