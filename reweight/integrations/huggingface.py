"""For transformers: exits from hidden states, and a callback for its Trainer."""

import inspect
import os
import warnings
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import Trainer, TrainerCallback

from reweight._checks import kind
from reweight._passes.forward import held_by_a_part
from reweight.batches import describe
from reweight.integrations.hidden_states import IGNORED, HiddenStateExits, LabelShift
from reweight.integrations.meta_batches import check_meta, meta_batches
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.result import StepResult
from reweight.reweighter import SampleReweighter
from reweight.step import MetaReweightStep

__all__ = ["HiddenStateExits", "MetaReweight"]

NAME = "reweight.pt"  # of its file in a checkpoint


class MetaReweight(TrainerCallback):
    """Trains the model of a ``transformers.Trainer`` with learned weights.

    Give it to the Trainer twice: ``Trainer(..., callbacks=[reweight],
    compute_loss_func=reweight.compute_loss)``. The step runs in place of the Trainer's own forward
    and backward, on its batch and the next of ``meta``. The look-ahead knows ``max_grad_norm``,
    what is accumulated, and the scaling by ``num_items_in_batch``. Checkpoints hold the reweighter
    as ``reweight.pt``. On several processes the step is that of their batches joined.
    ``reweight.result`` is that of the last step. In evaluation the loss is the plain one, learned
    weights being 1: means by weights of your own, and auxiliary losses, are as in training. Labels
    that repeat ``input_ids``, as those of collators for causal models do, are shifted as
    transformers does.

    Args:
        reweighter: as of ``MetaReweightStep``.
        meta: a loader of batches as the Trainer's, dicts with ``labels``; begun anew at its end.
            What it draws by chance follows from the Trainer's seed. Of n processes each takes every
            n-th batch.
        options: keyword arguments of ``MetaReweightStep``, but ``clip_grad_norm`` and ``scaler``.

    Raises:
        TypeError: the reweighter is no module, an option is not one, or ``meta`` yields something
            else.
        ValueError: there are several devices in one process, label smoothing in the Trainer's
            arguments, a batch without labels, no meta batch, or no state to resume from; or the
            Trainer has only one of the two.
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
        self._shift, self._is_own_shift = LabelShift(), True  # or the model's, which it sees to
        self._state: dict[str, Any] | None = None  # of the checkpoint that the step begins with
        self._outermost: list[nn.Module] = []  # of the modules that the Trainer calls
        self._inputs: dict[str, Any] | None = None  # of the forward that was left out
        self._hidden: tuple[nn.Module, Any] | None = None  # and what the model had on itself

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look how the model takes its labels, and for a loss beside its exits."""
        found = LabelShift.of(kwargs["model"])
        self._shift, self._is_own_shift = found or LabelShift(), found is None
        self._auxiliary = held_by_a_part(kwargs["model"], "auxiliary_of_forward")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the step, and go on from the checkpoint that the Trainer goes on from."""
        if args.n_gpu > 1:
            raise ValueError("The Trainer must give each device a process of its own: torchrun.")
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be left out of TrainingArguments, got "
                f"{args.label_smoothing_factor}. Give the callback "
                "loss=partial(exit_cross_entropy, label_smoothing=...) in its place."
            )
        model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        labels = [name for name in signature(type(model).forward).parameters if "label" in name]
        if args.eval_strategy != "no" and not (labels or args.label_names):
            raise ValueError(
                "`label_names` in TrainingArguments must be ['labels'] to evaluate, got "
                f"{args.label_names}: `forward` names no labels, without which the Trainer "
                "computes neither eval_loss nor metrics."
            )
        # As the Trainer counts labels.
        self._shifts_counts = getattr(model, "loss_type", None) == "ForCausalLM"
        self._state, self.step, self.num_meta = None, None, 0
        if state.global_step:
            path = resumed_from(self._path(args, state).parent) / NAME
            if not path.exists():
                raise ValueError(f"`resume_from_checkpoint` must hold the state {path}, got none.")
            self._state = torch.load(path, weights_only=True)
            self.num_meta = self._state["num_meta"]
        self._args, self._batches = args, meta_batches(self.meta, args, self.num_meta)

    def _begin(self, model: nn.Module) -> MetaReweightStep:
        """The step of what the Trainer has wrapped, where it goes on from."""
        optimizer: Any = self._optimizer
        step = MetaReweightStep(
            model,
            getattr(optimizer, "optimizer", optimizer),
            self.reweighter.to(self._args.device),
            clip_grad_norm=self._args.max_grad_norm or None,
            scaler=getattr(optimizer, "scaler", None),
            **self.options,
        )
        if self._state is not None:
            step.load_state_dict(self._state["step"])
        return step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the next forward, the Trainer's own; all others are real."""
        model, called = kwargs["model"], self._outermost
        self._hidden = model, vars(model).get("forward")  # Accelerate may have put one there
        watch = None
        if self.step is None:  # which is of the model as the Trainer calls it, in its wrapper
            called.clear()
            watch = register_module_forward_pre_hook(lambda module, _: called.append(module))

        def left_out(**inputs: Any) -> None:
            if watch is not None:
                watch.remove()
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
        if inputs is None:  # the Trainer adds up what it takes for parts of a mean
            averages = num_items_in_batch is not None and self._averages()
            return self._plain_loss(outputs, labels) / (dist.get_world_size() if averages else 1)
        share, own_share = self._shares(labels, num_items_in_batch)
        if self._is_own_shift:
            labels = self._shift(inputs, labels)
        if self.step is None:
            self.step = self._begin(self._outermost[0])
        meta = next(self._batches)
        check_meta(meta, labels)
        meta = {name: value.to(self._args.device) for name, value in meta.items()}
        target = meta.pop("labels")
        if self._is_own_shift:
            target = self._shift(meta, target)
        self.num_meta += 1
        self.result = self.step.backward((inputs, labels), (meta, target), scale=share)
        loss: Tensor = own_share * self.result.train_loss
        return loss.detach().requires_grad_().clone()  # of no parameter: its backward moves none

    def _averages(self) -> bool:
        """Whether the Trainer takes losses for parts of a mean over the tokens of all ranks."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and getattr(self._args, "average_tokens_across_devices", True)

    def _shares(self, labels: Tensor, num_items: Tensor | int | None) -> tuple[Any, Any]:
        """Of all that the Trainer takes a mean over, the share of this batch on all ranks; on this.

        In labels. The former scales the gradient, the latter the loss that the Trainer reports.
        """
        if num_items is None:
            return 1.0, 1.0
        counts = (labels[..., 1:] if self._shifts_counts else labels) != IGNORED
        sums = torch.stack([counts.sum(), torch.as_tensor(num_items, device=labels.device)])
        sums = sums.to(torch.float32 if sums.device.type == "mps" else torch.float64)
        own = sums[0] / sums[1].clamp(min=1)
        if self._args.world_size > 1:
            total = sums[1].clone()
            dist.all_reduce(sums)
            sums[1] = total if self._averages() else sums[1]  # of all ranks already, or not yet
        return sums[0] / sums[1].clamp(min=1), own

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of the step into the Trainer's checkpoint: aside, then renamed."""
        if self.step is not None and args.should_save:
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
        labels = self._shift(None, labels)
        result = loss(outputs if exits is None else exits(outputs), labels)
        losses = result if isinstance(result, ExitLosses) else ExitLosses(result)
        plain = losses.mean_over_samples(losses.losses).sum()
        for beside in (losses.auxiliary, self._auxiliary and self._auxiliary()):
            plain = plain if beside is None else plain + beside
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

    @staticmethod
    def _path(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / NAME


def resumed_from(folder: Path) -> Path:
    """The checkpoint that ``Trainer.train`` was told to go on from, or else this one.

    It may lie outside of ``output_dir``. The Trainer tells no callback, so the argument is read
    from its call.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "train" and isinstance(frame.f_locals.get("self"), Trainer):
            told = frame.f_locals.get("resume_from_checkpoint")
            return Path(told) if isinstance(told, str | os.PathLike) else folder
        frame = frame.f_back
    return folder
