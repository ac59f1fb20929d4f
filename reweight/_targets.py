"""What logits and a target must be, and the rows that they come to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reweight._kernels.dispatch import is_traced
from reweight.batches import describe


def exits_of(
    name: str, tensors: Tensor | Sequence[Tensor], target: Tensor, class_dim: int | None = -1
) -> list[Tensor]:
    """The tensor of each exit, [*S, C_k], whatever form they came in.

    ``class_dim`` is where the classes are in each; None for last, if that is the only reading.
    """
    if not isinstance(target, Tensor) or not (
        target.dtype == torch.int64 or (target.is_floating_point() and target.dim() > 1)
    ):
        got = type(target).__name__
        if isinstance(target, Tensor):
            got = f"a tensor of {target.dtype}, shape {list(target.shape)}"
            got += ": call target.long() if they are class indices"
        raise TypeError(
            "`target` must hold class indices as an int64 tensor, or probabilities [..., C] as a "
            f"floating point one, got {got}."
        )
    if target.numel() == 0:
        raise ValueError(f"`target` must hold at least one sample, got shape {list(target.shape)}.")
    samples = target.shape[:-1] if target.is_floating_point() else target.shape
    if isinstance(tensors, Tensor):
        exits = list(tensors) if tensors.dim() == len(samples) + 2 and len(tensors) else [tensors]
    elif isinstance(tensors, Sequence) and tensors and all(isinstance(z, Tensor) for z in tensors):
        exits = list(tensors)
    else:
        raise TypeError(
            f"`{name}` must be a tensor or a non-empty list or tuple of tensors, one for each "
            f"exit, got {describe(tensors)}. Pass `exits=`, a function that takes the logits out "
            "of what the model returns."
        )
    if class_dim not in (None, -1):
        exits = [each.movedim(class_dim, -1) if each.dim() > 1 else each for each in exits]
    classes = "C" if target.dtype == torch.int64 else target.shape[-1]
    for index, each in enumerate(exits, start=1):
        shape = each.shape
        if not each.is_floating_point():
            raise TypeError(f"`{name}` of exit {index} must be floating point, got {each.dtype}.")
        if name == "logits" and shape[-1:] == (1,) and each.dim() > len(samples):
            raise ValueError(
                f"`logits` of exit {index} must be of two classes or more, got {list(shape)}: "
                "of one it is always 0. Pass `loss=`, (outputs, target) → losses [B, K]."
            )
        # Of a class index for each token or pixel; PyTorch has the classes second.
        second = class_dim is None and len(samples) > 1 and target.dtype == torch.int64
        second = second and (*shape[:1], *shape[2:]) == samples
        if second and shape[:-1] == samples:
            raise ValueError(
                f"`{name}` of exit {index} can be read in two ways, {list(shape)}: with the "
                "classes last, or second as in torch.nn.functional.cross_entropy. Pass "
                "class_dim=-1 or class_dim=1."
            )
        if second:
            raise ValueError(
                f"`{name}` of exit {index} must have the classes last, {[*samples, classes]}, got "
                f"{list(shape)}. Pass class_dim=1, or {name}.movedim(1, -1)."
            )
        if shape[:-1] != samples or each.numel() == 0 or classes not in ("C", shape[-1]):
            stacked = isinstance(tensors, Tensor) and tensors.shape[: len(samples)] == samples
            first = "One tensor has the exits first: logits.movedim(-2, 0). " if stacked else ""
            raise ValueError(
                f"`{name}` of exit {index} must have the samples of the target first and one more "
                f"dimension, {[*samples, classes]}, got {list(shape)}. "
                f"{first}Class indices are one number for each sample: target.squeeze(-1) of a "
                "column, target.argmax(-1) of rows of 0 and 1. Take input and target from the same "
                "batch. If the model returns more than logits, pass `exits=`."
            )
    return exits


def classes_of(
    target: Tensor, ignore_index: int, nums_classes: list[int]
) -> tuple[Tensor, Tensor, int | None]:
    """The target, one row for each sample; which samples count; ignore_index, None if all do."""
    if target.is_floating_point():
        target = _probabilities(target.flatten(0, -2))
        return target, torch.ones(len(target), dtype=torch.bool, device=target.device), None
    target = target.flatten()
    valid = target != ignore_index
    # Looking would wait for another device; compilers and transforms cannot look.
    if target.device.type != "cpu" or is_traced():
        return target, valid, ignore_index
    low, high = (int(bound) for bound in target.aminmax())
    fewest = min(nums_classes)
    if low >= 0 and high < fewest:
        return target, valid, ignore_index if low <= ignore_index <= high else None
    wrong = valid & ((target < 0) | (target >= fewest))
    if wrong.any():
        raise ValueError(
            f"`target` must lie in 0..{fewest - 1}, the classes of exit "
            f"{nums_classes.index(fewest) + 1} (or equal `ignore_index`={ignore_index}), got "
            f"{target[wrong][0].item()}."
        )
    return target, valid, ignore_index


def _probabilities(target: Tensor) -> Tensor:
    """The rows of a target [N, C], or an error if they are no probabilities; NaN on a GPU."""
    if is_traced():
        return target
    rows = target.detach()
    sums = rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
    # Coarser than what bfloat16 makes of many classes.
    wrong = ((sums - 1).abs() > 0.01) | (rows.amin(1) < 0)
    if target.device.type != "cpu":
        return target.masked_fill(wrong.unsqueeze(1), torch.nan)
    if wrong.any():
        raise ValueError(
            "`target` must hold probabilities, in rows that sum to 1, or class indices as int64, "
            f"got a row that sums to {sums[wrong][0].item():.3g}. For several labels of a sample, "
            "or numbers to regress on, pass `loss=`, (outputs, target) → losses [B, K]: "
            "binary_cross_entropy_with_logits(z, target, reduction='none').mean(1) of each exit."
        )
    return target
