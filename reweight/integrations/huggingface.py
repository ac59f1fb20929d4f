"""For transformers: exits from hidden states, and a callback for its Trainer."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from reweight._checks import kind
from reweight.batches import describe
from reweight.integrations.hidden_states import HiddenStateExits
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.result import StepResult
from reweight.reweighter import SampleReweighter
from reweight.step import MetaReweightStep

__all__ = ["HiddenStateExits", "MetaReweight"]


class MetaReweight(TrainerCallback):
    """Trains the model of a ``transformers.Trainer`` with learned weights.

    Give it to the Trainer twice: ``Trainer(..., callbacks=[reweight],
    compute_loss_func=reweight.compute_loss)``. The step runs in place of the Trainer's own forward
    and backward, on its batch and the next of ``meta``. The look-ahead knows ``max_grad_norm``,
    what is accumulated, and the scaling by ``num_items_in_batch``. Checkpoints hold the reweighter
    as ``reweight.pt``. One process; ``reweight.result`` is that of the last step. In evaluation the
    loss is the plain one, with weights of 1.

    Args:
        reweighter: as of ``MetaReweightStep``.
        meta: a loader of batches as the Trainer's, dicts with ``labels``; begun anew at its end.
            Of language models the labels are the next tokens, shifted already.
        options: keyword arguments of ``MetaReweightStep``, but ``clip_grad_norm`` and ``scaler``.

    Raises:
        TypeError: the reweighter is no module, an option is not one, or ``meta`` yields something
            else.
        ValueError: there are several processes, label smoothing in the Trainer's arguments, a batch
            without labels, no meta batch, or no state to resume from; or the Trainer has only one
            of the two.
    """

    def __init__(
        self,
        reweighter: SampleReweighter,
        meta: Iterable[dict[str, Any]],
        **options: Any,
    ) -> None:
        if not isinstance(reweighter, nn.Module):
            raise TypeError(
                "`reweighter` must be a module such as SampleReweighter(num_exits=3), got "
                f"{kind(reweighter)}."
            )
        known = {"clip_grad_norm": None, "scaler": None}  # by the Trainer
        signature(MetaReweightStep).bind(None, None, reweighter, **known, **options)
        self.reweighter, self.meta, self.options = reweighter, meta, options
        self.step: MetaReweightStep | None = None
        self.result: StepResult | None = None
        self.num_meta = 0
        self._args: Any = None
        self._inputs: dict[str, Any] | None = None  # of the forward that was left out
        self._hidden: tuple[nn.Module, Any] | None = None  # and what the model had on itself

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the step, and go on from the checkpoint that the Trainer goes on from."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError("The Trainer must run in one process on one device for this callback.")
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be left out of TrainingArguments, got "
                f"{args.label_smoothing_factor}. Give the callback "
                "loss=partial(exit_cross_entropy, label_smoothing=...) in its place."
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        labels = [name for name in signature(type(model).forward).parameters if "label" in name]
        if args.eval_strategy != "no" and not (labels or args.label_names):
            raise ValueError(
                "`label_names` in TrainingArguments must be ['labels'] to evaluate, got "
                f"{args.label_names}: `forward` names no labels, without which the Trainer "
                "computes neither eval_loss nor metrics."
            )
        self.step = MetaReweightStep(
            model,
            getattr(optimizer, "optimizer", optimizer),
            self.reweighter.to(args.device),
            clip_grad_norm=args.max_grad_norm or None,
            scaler=getattr(optimizer, "scaler", None),
            **self.options,
        )
        if state.global_step:
            path = self._path(args, state)
            if not path.exists():
                raise ValueError(f"`resume_from_checkpoint` must hold the state {path}, got none.")
            saved = torch.load(path, weights_only=True)
            self.step.load_state_dict(saved["step"])
            self.num_meta = saved["num_meta"]
        self._args, self._batches = args, self._meta_batches(self.num_meta)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the next forward, the Trainer's own; all others are real."""
        model = kwargs["model"]
        self._hidden = model, vars(model).get("forward")  # Accelerate may have put one there

        def left_out(**inputs: Any) -> None:
            self._give_back()
            if "labels" in inputs:
                raise ValueError(
                    "The Trainer must get compute_loss_func=callback.compute_loss too, got the "
                    "callback alone."
                )
            inputs.pop("num_items_in_batch", None)  # the Trainer's, not of the batch
            self._inputs = inputs

        model.forward = left_out

    on_substep_end = on_step_begin

    def compute_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The step on the batch at hand: its gradient is added to ``.grad`` at once.

        In evaluation, the plain loss of what the model has returned.
        """
        inputs, self._inputs = self._inputs, None
        if inputs is None and torch.is_grad_enabled():
            raise ValueError(
                "The Trainer must get callbacks=[callback] too, got its compute_loss alone."
            )
        if labels is None:
            remedy = ""
            if self._args is not None and self._args.remove_unused_columns:
                remedy = (
                    " The Trainer drops what `forward` does not name: remove_unused_columns=False "
                    "in TrainingArguments keeps it."
                )
            got = describe(inputs)
            raise ValueError(f"A batch of the Trainer must have `labels`, got {got}.{remedy}")
        # The step takes means over its valid labels; the Trainer wants sums over num_items.
        num = (labels != -100).sum().item()
        share = 1.0 if num_items_in_batch is None else num / max(float(num_items_in_batch), 1.0)
        if inputs is None or self.step is None:
            return share * self._plain_loss(outputs, labels)
        meta = next(self._batches)
        _check_meta(meta, labels)
        meta = {name: value.to(self._args.device) for name, value in meta.items()}
        self.num_meta += 1
        # Without a valid label there is nothing to scale.
        scale = share or 1.0
        self.result = self.step.backward((inputs, labels), (meta, meta.pop("labels")), scale=scale)
        # Of no parameter, so that its backward leaves them alone.
        return (share * self.result.train_loss).detach().requires_grad_().clone()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of the step into the Trainer's checkpoint: aside, then renamed."""
        if self.step is not None:
            path = self._path(args, state)
            saved = {"step": self.step.state_dict(), "num_meta": self.num_meta}
            torch.save(saved, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give back the forward of a step that was begun and stopped."""
        self._give_back()

    on_epoch_end = on_train_end

    def _give_back(self) -> None:
        if self._hidden is not None:
            (model, own), self._hidden = self._hidden, None
            del model.forward
            if own is not None:
                model.forward = own

    def _plain_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        exits, loss = self.options.get("exits"), self.options.get("loss", exit_cross_entropy)
        result = loss(outputs if exits is None else exits(outputs), labels)
        losses = result if isinstance(result, ExitLosses) else ExitLosses(result)
        plain = losses.mean_over_samples(losses.losses).sum()
        # The Trainer takes the first of what is no dict for the loss, and the rest for predictions.
        if isinstance(outputs, list):
            outputs.insert(0, plain)
        elif not isinstance(outputs, dict):
            warnings.warn(
                f"`model` must return a list of logits, got {type(outputs).__name__}: the Trainer "
                "leaves its first out of the predictions, which compute_metrics gets.",
                stacklevel=2,
            )
        return plain

    def _meta_batches(self, start: int) -> Iterator[Any]:
        while True:
            batch = None
            for batch in self.meta:
                if start > 0:
                    start -= 1
                    continue
                yield batch
            if batch is None:
                raise ValueError(
                    "`meta` must begin anew each time it is gone through, as a DataLoader does, "
                    "got nothing."
                )

    @staticmethod
    def _path(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "reweight.pt"


def _check_meta(batch: Any, labels: Tensor) -> None:
    """Raise TypeError unless a meta batch is like the Trainer's, with these labels."""
    wrong = None
    if not isinstance(batch, Mapping):
        wrong = describe(batch)
    elif not all(isinstance(value, Tensor) for value in batch.values()):
        wrong = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items())
    elif "labels" not in batch or batch["labels"].dim() != labels.dim():
        wrong = describe(batch)
    if wrong is not None:
        raise TypeError(
            "`meta` must yield batches as the Trainer's, dicts of tensors with `labels` of "
            f"{labels.dim()} dimensions, got {wrong}. Make a loader of a data set, "
            "DataLoader(meta_set, batch_size=8), with the Trainer's collator if it has one."
        )
