"""For transformers: exits from hidden states, and a callback for its Trainer."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from reweight.result import StepResult
from reweight.reweighter import SampleReweighter
from reweight.step import MetaReweightStep


class HiddenStateExits(nn.Module):
    """Exits at chosen layers of a transformers model, from its hidden states.

    Args:
        backbone: called with ``output_hidden_states=True``; its ``hidden_states[0]`` are the
            embeddings.
        layers: of which hidden states the exits are, from the first exit to the last.
        heads: one module for each exit, or a single one that all share. Default None: the hidden
            states themselves are returned, for ``linear_exit_cross_entropy`` with the head of a
            language model.
        pooled: heads take the mean of the states over the tokens that ``attention_mask`` keeps,
            [B, H], as a classifier does, and not every token's, [B, T, H].

    Raises:
        ValueError: there is no layer, or not one head for each.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[int],
        heads: nn.Module | Sequence[nn.Module] | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if heads is not None and not isinstance(heads, nn.Module):
            heads = nn.ModuleList(heads)
        if not layers or (isinstance(heads, nn.ModuleList) and len(heads) != len(layers)):
            raise ValueError(f"`heads` must be one for each of `layers`, got {len(layers)} layers.")
        self.backbone, self.layers, self.pooled = backbone, tuple(layers), pooled
        self.heads = heads

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> list[Tensor]:
        """What each exit says, [B, C], [B, T, C] or [B, T, H]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs
        )
        states = [output.hidden_states[layer] for layer in self.layers]
        if self.pooled:
            kept = attention_mask.unsqueeze(-1).to(states[0].dtype)
            states = [(state * kept).sum(1) / kept.sum(1).clamp(min=1) for state in states]
        if self.heads is None:
            return states
        if not isinstance(self.heads, nn.ModuleList):
            return [self.heads(state) for state in states]
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


class MetaReweight(TrainerCallback):
    """Trains the model of a ``transformers.Trainer`` with learned weights.

    Give it to the Trainer twice: ``Trainer(..., callbacks=[reweight],
    compute_loss_func=reweight.compute_loss)``. The step runs in place of the Trainer's own forward
    and backward, on its batch and the next of ``meta``. The look-ahead knows ``max_grad_norm``,
    what is accumulated, and the scaling by ``num_items_in_batch``. Checkpoints hold the reweighter
    as ``reweight.pt``. One process; ``reweight.result`` is that of the last step.

    Args:
        reweighter: as of ``MetaReweightStep``.
        meta: a loader of batches as the Trainer's, dicts with ``labels``; begun anew at its end.
            Of language models the labels are the next tokens, shifted already.
        options: keyword arguments of ``MetaReweightStep``, but ``clip_grad_norm`` and ``scaler``.

    Raises:
        ValueError: there are several processes, a batch without labels, no meta batch, or no state
            to resume from.
    """

    def __init__(
        self,
        reweighter: SampleReweighter,
        meta: Iterable[dict[str, Any]],
        **options: Any,
    ) -> None:
        self.reweighter, self.meta, self.options = reweighter, meta, options
        self.step: MetaReweightStep | None = None
        self.result: StepResult | None = None
        self.num_meta = 0
        self._waiting = False
        self._inputs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the step, and go on from the checkpoint that the Trainer goes on from."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError("The Trainer must run in one process on one device for this callback.")
        model, optimizer = kwargs["model"], kwargs["optimizer"]
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
        self._device, self._batches = args.device, self._meta_batches(self.num_meta)
        forward, self._own = model.forward, vars(model).get("forward")

        def left_out(*positional: Any, **inputs: Any) -> Any:
            """The Trainer's own forward only says what its batch is; the step's are real."""
            if not self._waiting:
                return forward(*positional, **inputs)
            self._waiting, self._inputs = False, inputs
            return None

        model.forward = left_out

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The next forward is the Trainer's own."""
        self._waiting = True

    on_substep_end = on_step_begin

    def compute_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The step on the batch at hand: its gradient is added to ``.grad`` at once."""
        if self.step is None or labels is None or not self._inputs:
            raise ValueError(
                "`compute_loss` must get a batch with `labels` of a Trainer that has this callback "
                "too. The Trainer drops what `forward` does not name: remove_unused_columns=False "
                "keeps it."
            )
        train, self._inputs = (self._inputs, labels), {}
        meta = dict(next(self._batches))
        self.num_meta += 1
        # The step takes means over its valid labels; the Trainer wants sums over num_items.
        num = (labels != -100).sum().item()
        share = 1.0 if num_items_in_batch is None else num / float(num_items_in_batch)
        self.result = self.step.backward(train, (meta, meta.pop("labels")), scale=share)
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
        """Give back the model's own forward, or the one Accelerate has put on the object."""
        del kwargs["model"].forward
        if self._own is not None:
            kwargs["model"].forward = self._own

    def _meta_batches(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            batch = None
            for batch in self.meta:
                if start > 0:
                    start -= 1
                    continue
                yield {name: value.to(self._device) for name, value in batch.items()}
            if batch is None:
                raise ValueError(
                    "`meta` must begin anew each time it is gone through, as a DataLoader does, "
                    "got nothing."
                )

    @staticmethod
    def _path(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "reweight.pt"
