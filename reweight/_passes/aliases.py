"""Other tensors over the memory of a parameter: they stay where the look-ahead replaces it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from reweight._passes.memory import is_plain


def aliases(parameters: Mapping[str, Tensor], others: Iterable[Tensor]) -> list[str]:
    """The names of those of which one of the others, without a graph, shares a byte."""
    spans = defaultdict[int, list[tuple[range, str]]](list)  # by where their memory begins
    for name, parameter in parameters.items():
        if is_plain(parameter):
            spans[_address(parameter)].append((_span(parameter), name))
    found = [
        name
        for tensor in others
        if is_plain(tensor) and not tensor.requires_grad
        for span, name in spans.get(_address(tensor), ())
        if range(max(span.start, _span(tensor).start), min(span.stop, _span(tensor).stop))
    ]
    return list(dict.fromkeys(found))


def second_reference(names: Sequence[str]) -> ValueError:
    """What to say of these parameters."""
    return ValueError(
        f"`model` must read its parameters where its modules hold them, got {', '.join(names)}, to "
        "which there is a second reference: in a list, a buffer or another attribute, a closure, "
        "or a partial in `loss` or `exits`. What is read there stays as it is when the look-ahead "
        "moves the parameter. Read it from the module at each call."
    )


def _address(tensor: Tensor) -> int:
    """Where its memory begins, which an array of NumPy over it has in common."""
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> range:
    """From its first byte to its last, by address; none of what has no memory now."""
    first, sizes = tensor.data_ptr(), zip(tensor.size(), tensor.stride(), strict=True)
    size = (sum((n - 1) * step for n, step in sizes) + 1) * tensor.element_size()
    is_held = first and tensor.numel() and tensor.untyped_storage().size()
    return range(first, first + (size if is_held else 0))
