"""Per-sample, per-exit losses: the matrix l[i,k] that everything else in the package is about."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from reweight._checks import check_number, check_positive, check_share
from reweight._kernels import composite
from reweight._kernels.dispatch import choose
from reweight._kernels.function import fused
from reweight._kernels.linear import linear_cross_entropy
from reweight._ranks.collectives import sum_over_ranks
from reweight._targets import classes_of, exits_of

Logits: TypeAlias = Tensor | Sequence[Tensor]
"""K tensors [*S, C], one tensor [K, *S, C], or for a single exit one tensor [*S, C].

S is the shape of the target: [B] for a classifier, [B, T] for a language model.
"""


class ExitLosses(NamedTuple):
    """What one look at the logits of every exit yields; B counts samples (or tokens).

    Attributes:
        losses: l[i,k], shape [B, K], float32 (float64 for float64 logits), with a graph.
        confidence: the largest softmax probability, shape [B, K], without a graph.
        correct: whether the most probable class is the target, shape [B, K], bool.
        valid: the samples that count, shape [B], bool, or at which exits, [B, K], where some labels
            are missing; None stands for all of them.
        labels: the target of each sample, int64 [B] or probabilities [B, C].
        features: what else a reweighter may see of each sample, shape [B, F].
        weight: weights of your own, at least 0, shape [B] or [B, K], beside the learned ones: every
            mean over samples is Σ weight·value / Σ weight, here and in the objectives.
        auxiliary: a loss that no weight is for, scalar, with a graph: a regulariser, the balance of
            a router. It is added to L_tr as it is, and is no part of L_meta.

    A loss function of your own that knows only the losses returns ``ExitLosses(losses)``, or just
    the tensor.
    """

    losses: Tensor
    confidence: Tensor | None = None
    correct: Tensor | None = None
    valid: Tensor | None = None
    labels: Tensor | None = None
    features: Tensor | None = None
    weight: Tensor | None = None
    auxiliary: Tensor | None = None

    @classmethod
    def cat(cls, parts: Iterable["ExitLosses"]) -> "ExitLosses":
        """The samples of several batches in one; what a part lacks, the whole lacks too.

        Example:
            >>> batches = [ExitLosses(torch.rand(4, 2)), ExitLosses(torch.rand(3, 2))]
            >>> ExitLosses.cat(batches).losses.shape
            torch.Size([7, 2])
        """
        samples = [part._replace(auxiliary=None) for part in parts]
        columns = [[x for x in column if x is not None] for column in zip(*samples, strict=True)]
        joined = [torch.cat(c) if len(c) == len(columns[0]) else None for c in columns]
        return cls(*joined)  # type: ignore[arg-type]

    @property
    def counted(self) -> Tensor | None:
        """What ``valid`` says of each loss, shape [B, 1] or [B, K]."""
        if self.valid is None or self.valid.dim() == 2:
            return self.valid
        return self.valid.unsqueeze(1)

    def sample_shares(self) -> Tensor:
        """The share of each sample in ``mean_i``: 1/B, or 0 where a sample does not count.

        By ``weight`` if there is one. Within a distributed step B counts the samples of all ranks.

        Returns:
            Shape [B, 1], or [B, K] where it is another at each exit, the dtype of the losses. All
            zero if no sample counts.
        """
        counted = self.counted
        if counted is None:
            shares = self.losses.new_ones(len(self.losses), 1)
        else:
            shares = counted.to(self.losses.dtype)
        if self.weight is not None:
            own = self.weight.detach().to(self.losses.dtype).reshape(len(self.losses), -1)
            shares = torch.where(shares > 0, own, 0)
        total = sum_over_ranks(shares.sum(0))
        return shares / total.clamp(min=torch.finfo(total.dtype).tiny)

    def mean_over_samples(self, values: Tensor) -> Tensor:
        """The mean of each column of values [B, K] over the samples that count, shape [K].

        Within a distributed step this rank's part of it; the parts of all ranks add up to the mean.
        What stands in the other rows does not matter, not even if it is infinite.
        """
        counted = self.counted
        if counted is not None:
            values = values.masked_fill(~counted, 0)
        return (self.sample_shares() * values).sum(0)


def exit_cross_entropy(
    logits: Logits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    class_dim: int | None = None,
    impl: str = "auto",
    probabilities: bool = False,
) -> ExitLosses:
    """Cross-entropy of every sample at every exit; confidence and correctness from the same pass.

    The losses equal ``torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits],
    dim=1)``, computed in float32 at least; every token of a [B, T] target is a sample of its own.
    Derivatives of every order and mode are exact, also under ``torch.func`` and ``torch.compile``,
    or raise: PyTorch has no second order of what is compiled.

    Args:
        logits: K tensors [B, C_k] or [B, T, C_k]; one tensor [K, B, C] or [K, B, T, C]; or for a
            single exit one tensor [B, C] or [B, T, C].
        target: class indices, int64, shape [B] or [B, T]; or probabilities, shape [B, C] or
            [B, T, C], the same for all exits.
        ignore_index: samples with this target have loss 0 and gradient 0 (even where a logit is not
            a number), are never correct, and are not ``valid``: they drop out of every mean.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, in [0, 1].
        class_weight: one weight per class, shape [C], multiplied into the losses. Means stay those
            over samples; for the mean of ``torch.nn.functional.cross_entropy``, over the weights,
            give ``weight=class_weight[target]`` to what is returned, by ``_replace``, instead.
        class_dim: where the classes are in the tensor of each exit, and in probabilities as target:
            −1, or 1 for dense logits [B, C, H, W] as PyTorch has them. Default None: last, and an
            error where both readings fit the target.
        impl: "torch" (few PyTorch operations, for the CPU), "triton" (one launch for all exits),
            "reference" (plain differentiable operations), or "auto" (default): the first that fits,
            of "triton" on a GPU and "torch" on the CPU. The first two know class indices only, and
            label smoothing or class weights but not both; "auto" takes the reference for the rest.
            Under ``torch.compile``, which fuses it, and ``torch.func`` all are the reference.
        probabilities: give the mean over the exits of what they hold probable, [B, C], as features,
            for a reweighter that sees them. Default False.

    Returns:
        :class:`ExitLosses` with B·T samples where the target is [B, T].

    Raises:
        TypeError: the logits are neither a tensor nor a sequence of tensors, or the target is
            neither int64 nor floating point.
        ValueError: shapes disagree, the batch is empty, an option is out of range or not for this
            implementation, or a target is out of range or of rows that do not sum to 1. That is
            checked on the CPU; on other devices PyTorch's own assertion reports it, or the loss is
            NaN (Triton, probabilities).

    Example:
        >>> early = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> late = torch.tensor([[4.0, 0.0], [0.0, -3.0]])
        >>> result = exit_cross_entropy([early, late], torch.tensor([0, 1]))
        >>> result.losses
        tensor([[0.1269, 0.0181],
                [0.3133, 3.0486]])
        >>> result.correct
        tensor([[ True,  True],
                [ True, False]])
    """
    check_share("label_smoothing", label_smoothing)
    if class_dim not in (None, -1) and isinstance(target, Tensor) and target.is_floating_point():
        target = target.movedim(class_dim, -1)
    exits = exits_of("logits", logits, target, class_dim)
    nums_classes = [z.shape[-1] for z in exits]
    if class_weight is not None and any(class_weight.shape != (c,) for c in nums_classes):
        raise ValueError(
            "`class_weight` must have one weight for each class of every exit, shapes "
            f"{sorted({(c,) for c in nums_classes})}, got {tuple(class_weight.shape)}."
        )
    implementation = choose(impl, exits, target, label_smoothing, class_weight)
    classes, valid, ignore = classes_of(target, ignore_index, nums_classes)
    apart = class_dim not in (None, -1) or implementation == "reference"
    tensors = [logits] if isinstance(logits, Tensor) and not apart else exits
    rows = [z if z.dim() == 2 else z.reshape(-1, z.shape[-1]) for z in tensors]
    if implementation == "reference":
        results = composite.forward(rows, classes, ignore, label_smoothing, class_weight)
    else:
        results = fused(rows, classes, ignore, label_smoothing, implementation)
        results = _by_class(results[0], class_weight, classes, valid), *results[1:]
    features = None
    if probabilities:
        if len(set(nums_classes)) > 1:
            raise ValueError(
                "`probabilities` must be left out where exits have different classes, got "
                f"{nums_classes} of them."
            )
        softmax = [z.reshape(len(valid), -1).softmax(1, results[0].dtype) for z in exits]
        features = torch.stack(softmax).mean(0)
    return ExitLosses(*results, valid, classes, features)


def linear_exit_cross_entropy(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> ExitLosses:
    """``exit_cross_entropy`` of exits that share one linear head, without their logits in memory.

    For language models, whose logits are far larger than all else: about 256 rows of them, of all
    exits together, exist at a time, and the backward computes them again. The gradient of the head
    is added up in float32. Derivatives of every order and mode are exact; those of second order,
    ``torch.compile`` and ``torch.func`` hold all logits after all. Under autocast the products are
    computed in its dtype, as those of ``torch.nn.functional.linear`` are.

    Args:
        hidden: what enters the head at each exit: K tensors [B, D] or [B, T, D], or one [K, B, D]
            or [K, B, T, D].
        weight: of the head, shape [V, D].
        target: class indices, int64, shape [B] or [B, T].
        bias: of the head, shape [V]. Default: none.
        ignore_index: as in :func:`exit_cross_entropy`.
        label_smoothing: as in :func:`exit_cross_entropy`.
        class_weight: as in :func:`exit_cross_entropy`, shape [V]; not with label smoothing.
        softcap: logits z become softcap·tanh(z / softcap), as in Gemma 2 (30 there). Default: none.
        z_loss: z_loss·(log Σ exp z)² is added to each loss, not weighted by class, as in PaLM (1e-4
            there). Default 0.

    Returns:
        :class:`ExitLosses` with B·T samples where the target is [B, T].

    Raises:
        TypeError: the hidden states are neither a tensor nor a sequence of tensors, or the target
            is not int64.
        ValueError: shapes disagree, the batch is empty, or an option or a target is out of range.

    Example:
        >>> head = torch.nn.Linear(8, 100)
        >>> early, late = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> target = torch.randint(100, (2, 3))
        >>> linear_exit_cross_entropy([early, late], head.weight, target, head.bias).losses.shape
        torch.Size([6, 2])
    """
    check_share("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    if softcap is not None:
        check_positive("softcap", softcap)
    if label_smoothing and class_weight is not None:
        raise ValueError("`label_smoothing` must be 0 beside `class_weight`, got both.")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"`target` must hold class indices as int64, got {target.dtype}.")
    exits = exits_of("hidden", hidden, target)
    for exit_hidden in exits:
        if weight.dim() != 2 or weight.shape[1] != exit_hidden.shape[-1]:
            raise ValueError(
                f"`weight` must have the shape ['V', {exit_hidden.shape[-1]}], its rows as long as "
                f"those of `hidden`, got {list(weight.shape)}."
            )
    for name, each in (("bias", bias), ("class_weight", class_weight)):
        if each is not None and each.shape != weight.shape[:1]:
            raise ValueError(
                f"`{name}` must have the shape [{len(weight)}], got {list(each.shape)}."
            )
    classes, valid, ignore = classes_of(target, ignore_index, [len(weight)])
    rows = [each.reshape(len(classes), -1) for each in exits]
    head = [weight] if bias is None else [weight, bias]
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        head, rows = ([each.to(dtype) for each in tensors] for tensors in (head, rows))
    with torch.autocast(device, enabled=False):  # the backward, run outside of it, computes alike
        losses, confidence, correct, normaliser = linear_cross_entropy(
            rows, head, classes, ignore, label_smoothing, softcap
        )
    losses = _by_class(losses, class_weight, classes, valid)
    if z_loss:
        losses = losses + z_loss * normaliser.square()
    return ExitLosses(losses, confidence, correct, valid, classes)


def _by_class(
    losses: Tensor, class_weight: Tensor | None, classes: Tensor, valid: Tensor
) -> Tensor:
    """Losses [B, K] times the weight of the class of each sample that counts."""
    if class_weight is None:
        return losses
    factor = class_weight.to(losses.dtype)[torch.where(valid, classes, 0)]
    return losses * torch.where(valid, factor, 1).unsqueeze(1)
