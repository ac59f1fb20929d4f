"""A Lightning callback that trains with :class:`reweight.MetaReweightStep`."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from reweight._checks import check_function, kind
from reweight._passes.forward import call
from reweight.batches import describe
from reweight.result import StepResult
from reweight.reweighter import SampleReweighter
from reweight.step import MetaReweightStep


class MetaReweight(Callback):
    """Trains the module with learned weights; without the callback it trains as before.

    While ``Trainer.fit`` runs, the backward of automatic optimisation is that of the step: what the
    module's ``forward`` returns are the logits of its exits, and its ``training_step`` is not
    called. Optimizer, schedulers, precision, accumulation, DDP and checkpoints stay Lightning's,
    and the look-ahead clips and scales as the Trainer does. The train loader yields pairs (train,
    meta), as ``CombinedLoader([train_loader, meta_loader], "max_size_cycle")`` does; with
    ``lagged=True`` it may yield (inputs, target), and the next batch judges.

    ``training_step`` cannot know its loss before the backward, so that hooks see the train loss as
    ``outputs["loss"]`` from this callback on: put it first. The scalars of every step are logged
    with ``log_dict``; the step itself is ``callback.step`` once training has started.

    Args:
        reweighter: as of ``MetaReweightStep``; made after ``seed_everything``, it is the same on
            all ranks.
        count: target → how many samples or tokens of it count. With it, batches that the Trainer
            accumulates make a mean over all of these, and the gradient is at any time the mean of
            those so far. Default None: the mean of the batches' means, as Lightning takes it.
        options: keyword arguments of ``MetaReweightStep``, but for those that the Trainer knows:
            ``clip_grad_norm`` and ``scaler``.

    Raises:
        TypeError: the reweighter is no module, or an option is not one.
        ValueError: the module optimizes manually, the Trainer clips gradients by value, or a batch
            is no pair (train, meta) where one is needed: accumulating, with ``lagged=True`` too.

    Example:
        >>> from reweight import SampleReweighter
        >>> callback = MetaReweight(SampleReweighter(num_exits=3), interval=10)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        reweighter: SampleReweighter,
        *,
        count: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        check_function("count", count, "target → number of samples that count")
        if not isinstance(reweighter, nn.Module):
            raise TypeError(
                "`reweighter` must be a module such as SampleReweighter(num_exits=3), got "
                f"{kind(reweighter)}."
            )
        for name in ("clip_grad_norm", "scaler"):
            if name in options:
                raise TypeError(f"`{name}` must be left to the Trainer, got one in `options`.")
        signature(MetaReweightStep).bind(None, None, reweighter, **options)  # or raises TypeError
        self.reweighter, self.count, self.options = reweighter, count, options
        self.step: MetaReweightStep | None = None
        self._loaded: dict[str, Any] | None = None
        self._result: StepResult | None = None
        self._num_accumulated: Tensor | float = 0  # samples whose mean gradient is in `.grad`
        self._hidden: dict[str, Any] = {}  # what the module had on itself, by the methods' names

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the step of what the strategy has moved and wrapped, and take over the backward."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "`automatic_optimization` must be True, got a module that optimizes manually: call "
                "MetaReweightStep in its training_step instead."
            )
        max_norm = trainer.gradient_clip_val or None
        if max_norm is not None and str(trainer.gradient_clip_algorithm or "norm") != "norm":
            raise ValueError("`gradient_clip_algorithm` must be 'norm', got 'value'.")
        self.step = step = MetaReweightStep(
            trainer.strategy.model or pl_module,
            trainer.optimizers,
            self.reweighter.to(pl_module.device),
            clip_grad_norm=max_norm,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **self.options,
        )
        if self._loaded is not None:
            step.load_state_dict(self._loaded)
            self._loaded = None
        current: dict[str, Any] = {}

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            train, meta = batch if _is_pair(batch) and all(map(_is_pair, batch)) else (batch, None)
            if getattr(trainer.fit_loop, "_skip_backward", False):
                # Weight averaging looks once at all batches, for the statistics of BatchNorm.
                self._result = None
                with torch.no_grad():
                    call(pl_module, train[0])
                return next(pl_module.parameters()).new_zeros(())
            if meta is None and not (step.lagged and trainer.accumulate_grad_batches == 1):
                raise ValueError(
                    "A batch must be a pair (train, meta), each (inputs, target), got "
                    f"{describe(batch)}. Give the Trainer CombinedLoader([train_loader, "
                    "meta_loader], 'max_size_cycle'), or set lagged=True and accumulate nothing."
                )
            current.update(train=train, meta=meta)
            return next(pl_module.parameters()).new_zeros(())

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            with trainer.precision_plugin.train_step_context():
                result = step.backward(**current, scale=self._scale(trainer, current["train"][1]))
            current.clear()
            self._result = result

        # On the object, where they hide the methods of its class until on_train_end.
        self._hidden = {name: vars(pl_module).get(name) for name in ("training_step", "backward")}
        pl_module.training_step = training_step  # type: ignore[method-assign]
        pl_module.backward = backward  # type: ignore[method-assign]

    def on_before_zero_grad(self, *_: Any) -> None:
        """Begin to accumulate anew."""
        self._num_accumulated = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Say what the loss was, and log the scalars of the step."""
        if self._result is not None:
            outputs["loss"] = self._result.train_loss
            scalars = {f"reweight/{name}": value for name, value in self._result.scalars().items()}
            pl_module.log_dict(scalars, batch_size=len(self._result.weights))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back the module's own methods."""
        for name, own in self._hidden.items():
            delattr(pl_module, name)
            if own is not None:
                setattr(pl_module, name, own)
        self._hidden = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give back the module's own methods."""
        self.on_train_end(trainer, pl_module)

    def _scale(self, trainer: Trainer, target: Any) -> Tensor | float:
        """The factor of this batch's mean gradient, after making room for it in ``.grad``."""
        if self.count is None or self.step is None:
            return 1 / trainer.accumulate_grad_batches
        num = trainer.strategy.reduce(torch.as_tensor(self.count(target)), reduce_op="sum")
        num = num.to(torch.float32 if num.device.type == "mps" else torch.float64)
        total = (self._num_accumulated + num).clamp(min=1)
        for parameter in self.step.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self._num_accumulated / total)
        self._num_accumulated = total
        return num / total

    def state_dict(self) -> dict[str, Any]:
        """The state of the step, for the Trainer's checkpoint."""
        return (self._loaded or {}) if self.step is None else self.step.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the step is made."""
        self._loaded = state_dict or None


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2
