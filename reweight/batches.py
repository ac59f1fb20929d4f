"""Batches: pairs of inputs and target, and a train and a meta batch made of one."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from reweight._checks import check_whole

Batch: TypeAlias = tuple[Any, Any]
"""Inputs and target; the inputs are a tensor, a tuple of arguments or a dict of named ones."""


class swap_halves:
    """Train on one half of each batch with the other as meta batch, then the other way round.

    Two steps come of each batch, as in Han, Pu et al. (ECCV 2022), so that a schedule by steps is
    twice as long; the first half of an odd batch is the larger. A batch of one sample has no halves
    and is left out with a warning. It can be gone through as often as the loader can.

    Args:
        loader: yields (inputs, target); every tensor in them has the samples first.

    Yields:
        (train, meta), each (inputs, target); twice as many as the loader has batches.

    Raises:
        TypeError: a batch is not a pair, or holds samples in something else than tensors.
        ValueError: the tensors of a batch have different numbers of samples.

    Example:
        >>> import torch
        >>> for train, meta in swap_halves([(torch.arange(4.0), torch.tensor([0, 1, 0, 1]))]):
        ...     print(train[0].tolist(), meta[0].tolist())
        [0.0, 1.0] [2.0, 3.0]
        [2.0, 3.0] [0.0, 1.0]
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """How many steps there are, if the loader says how many batches it has."""
        return 2 * len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        """Go through the loader once."""
        for batch in self.loader:
            yield from _halves(batch)


def _halves(batch: Any) -> Iterator[tuple[Batch, Batch]]:
    inputs, target = unpack(batch, "the batch of `loader`")
    size = num_samples((inputs, target))
    if size < 2:
        warnings.warn(
            f"Left out a batch of {size}, which cannot be halved; drop_last=True in the loader "
            "avoids it.",
            stacklevel=3,
        )
        return
    middle = (size + 1) // 2
    first, second = (
        (rows_of(inputs, half), rows_of(target, half))
        for half in (slice(middle), slice(middle, None))
    )
    yield first, second
    yield second, first


def balanced_split(
    labels: Tensor | Sequence[int], per_class: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hold out as many samples of every class as meta data, where no clean ones can be had.

    A meta set of the training data, balanced over the classes, is the recipe of CMW-Net (Shu et
    al., TPAMI 2023) for long tails. No sample is in both parts: what judges is never trained on.

    Args:
        labels: of the whole training set, shape [N], whole numbers.
        per_class: how many of each class that occurs are held out.
        generator: draws them. Default: the global one.

    Returns:
        The indices to train on and those that judge, int64, each in rising order, for
        ``torch.utils.data.Subset``.

    Raises:
        TypeError: ``per_class`` or the labels are no whole numbers.
        ValueError: the labels are not [N], or a class has too few samples to leave one to train on.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])
        >>> train, meta = balanced_split(labels, per_class=2)
        >>> labels[meta].bincount().tolist(), labels[train].bincount().tolist()
        ([2, 2], [3, 1])
    """
    check_whole("per_class", per_class)
    labels = torch.as_tensor(labels).cpu()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be whole numbers, got {labels.dtype}.")
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"`labels` must have the shape [N], got {list(labels.shape)}.")
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    if counts.min() <= per_class:
        fewest = int(counts.argmin())
        raise ValueError(
            f"`per_class` must leave a sample of every class to train on, got {per_class} where "
            f"class {int(classes[fewest])} has {int(counts[fewest])}. Hold out fewer."
        )
    order = torch.randperm(len(labels), generator=generator)
    order = order[inverse[order].argsort(stable=True)]  # class by class, each in a drawn order
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(labels)) - starts.repeat_interleave(counts)
    held_out = within < per_class
    return order[~held_out].sort().values, order[held_out].sort().values


def unpack(batch: Any, name: str) -> Batch:
    """The inputs and the target of a batch, or an error that names it.

    Raises:
        TypeError: the batch is not a pair.
        ValueError: the target holds no sample.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = type(batch).__name__
        got = f"a {got} of {len(batch)}" if isinstance(batch, tuple | list) else got
        remedy = "Several inputs go into a tuple or a dict: ((first, second), target)."
        if batch is None:
            remedy = "A meta batch must be given unless lagged=True."
        elif isinstance(batch, Mapping):
            remedy = 'Take the target out of the dict: (batch, batch.pop("labels")).'
        raise TypeError(f"{name} must be a pair (inputs, target), got {got}. {remedy}")
    inputs, target = batch
    if isinstance(target, Tensor) and target.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample, got {list(target.shape)} targets.")
    return inputs, target


def num_samples(batch: Batch) -> int:
    """How many samples every tensor of the batch holds.

    Raises:
        ValueError: they disagree, or there is none.
    """
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors_of(batch)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "The tensors of a batch must all have its samples first, got "
            f"{describe(batch)}. A loader gives batches; a data set, single samples."
        )
    return sizes.pop()


def drawn_rows(batch: Batch, fraction: float, seed: int) -> Tensor | None:
    """Some of its rows by chance, apart from all else that is random; None for all of them."""
    if fraction == 1:
        return None
    size = num_samples(batch)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return drawn[: max(1, round(fraction * size))].sort().values


def on_device_of(tensor: Tensor, rows: slice | Tensor) -> slice | Tensor:
    """The same rows, where a tensor can be indexed by them without a wait."""
    return rows if isinstance(rows, slice) else rows.to(tensor.device, non_blocking=True)


def describe(nested: Any) -> str:
    """What tensors these are, however nested, in words."""
    if isinstance(nested, Tensor):
        return f"{nested.dtype} {list(nested.shape)} on {nested.device}"
    if isinstance(nested, Mapping):
        return f"a dict({', '.join(f'{k}={describe(v)}' for k, v in nested.items())})"
    if isinstance(nested, tuple | list):
        name = type(nested).__name__
        parts = ", ".join(map(describe, nested))
        return f"a {name} of {len(nested)}: {parts}" if parts else f"an empty {name}"
    return type(nested).__name__


def tensors_of(nested: Any) -> Iterator[Tensor]:
    """Every tensor, however nested."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from tensors_of(value)
    elif isinstance(nested, tuple | list):
        for value in nested:
            yield from tensors_of(value)


def copied(nested: Any) -> Any:
    """Copies of every tensor, however nested, with no graph before them."""
    if isinstance(nested, Tensor):
        return nested.detach().clone().requires_grad_(nested.requires_grad)
    return _mapped(copied, nested)


def rows_of(nested: Any, rows: slice | Tensor) -> Any:
    """Some samples of every tensor, however nested; what is no tensor is the same for all.

    Raises:
        TypeError: there are samples in a list of texts or in a NumPy array.
    """
    if isinstance(nested, Tensor):
        return nested[on_device_of(nested, rows)]
    texts = isinstance(nested, tuple | list) and any(isinstance(value, str) for value in nested)
    if texts or isinstance(nested, np.ndarray):
        raise TypeError(
            "A batch must hold its samples in tensors to be divided, got "
            f"{'texts' if texts else 'a NumPy array'}. Convert them in the loader."
        )
    return _mapped(lambda value: rows_of(value, rows), nested)


def _mapped(function: Callable[[Any], Any], nested: Any) -> Any:
    """A container of what the function makes of each part; what is none stays as it is."""
    if isinstance(nested, Mapping):
        return {key: function(value) for key, value in nested.items()}
    if isinstance(nested, tuple | list):
        parts = map(function, nested)
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    return nested
