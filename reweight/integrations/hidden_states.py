"""Exits from the hidden states of a transformers model, and labels as its collators give them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reweight._passes.forward import held_by_a_part
from reweight.batches import tensors_of

IGNORED = -100  # the label of a token that does not count, in transformers


class LabelShift:
    """The labels of a causal model, moved to the positions that predict them.

    transformers' collators for causal models give the tokens themselves as labels, and its models
    shift them: position t predicts token t + 1. The last position then predicts nothing.

    Args:
        shifts: whether labels are shifted; None for whether those of the first batch repeat its
            tokens, wherever they count.
    """

    def __init__(self, shifts: bool | None = None) -> None:
        self.shifts = shifts
        self.tokens: Any = None  # that the model saw last

    def __call__(self, inputs: Any, labels: Any) -> Any:
        """The labels [B, T] of these inputs, for logits [B, T, C]."""
        if self.shifts is None:
            self.shifts = _repeats((inputs, self.tokens), labels)
        self.tokens = None
        if not self.shifts:
            return labels
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)

    @classmethod
    def of(cls, model: nn.Module) -> "LabelShift | None":
        """That of the model or of a part of it, which the step finds by itself."""
        found = held_by_a_part(model, "align_target")
        return found if isinstance(found, cls) else None


def _repeats(inputs: tuple[Any, Any], labels: Any) -> bool | None:
    """Whether labels are the tokens of the inputs; None if none of them counts."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() < 2:
        return False
    counts = labels != IGNORED
    if not counts.any():
        return None
    likes = [x for x in tensors_of(inputs) if x.shape == labels.shape and x.dtype == labels.dtype]
    if any(torch.equal(torch.where(counts, labels, x), x) for x in likes):
        return True
    if isinstance(inputs[0], Mapping) and "inputs_embeds" in inputs[0]:
        raise ValueError(
            "`shift_labels` must be True or False where `inputs_embeds` take the place of tokens, "
            "got None: whether labels repeat the tokens cannot be seen. True if they do."
        )
    return False


class RouterLoss:
    """The loss by which a mixture of experts balances its routers, of the forward that ran last.

    It is the model's own, times its ``router_aux_loss_coef``, and is there where the model's own
    loss has it: with ``output_router_logits=True`` in its config. Asking takes it away, graph and
    all.
    """

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def __call__(self) -> Tensor | None:
        """A scalar with a graph, or None."""
        found, self.found = self.found, None
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"found": None}  # no copy has a graph

    def look(self, backbone: nn.Module, output: Any, mask: Tensor | None) -> None:
        """Take it from what the backbone returns."""
        self.found = None
        config: Any = getattr(backbone, "config", None)
        found, logits = (getattr(output, name, None) for name in ("aux_loss", "router_logits"))
        if found is None and not logits and not getattr(config, "output_router_logits", False):
            return
        config = getattr(config, "text_config", config)
        coefficient = getattr(config, "router_aux_loss_coef", None)
        if found is None and logits:  # whoever has a head, and no other, computes it
            module = sys.modules[type(backbone).__module__]
            balance = getattr(module, "load_balancing_loss_func", None)
            num = getattr(config, "num_local_experts", getattr(config, "num_experts", None))
            if balance is not None and num is not None:
                found = balance(logits, num, config.num_experts_per_tok, mask)
        if found is None or coefficient is None:
            raise ValueError(
                "`backbone` must say how its routers are balanced, as Mixtral and Qwen-MoE do, got "
                f"{type(backbone).__name__}. Load it with output_router_logits=False, and give a "
                "loss of yours as `auxiliary` of ExitLosses."
            )
        self.found = coefficient * found


class HiddenStateExits(nn.Module):
    """Exits at chosen layers of a transformers model, from its hidden states.

    Of an encoder for texts, images or audio, of a decoder, or of the decoder of a model with both.
    The norm that follows the last layer also comes before every earlier exit, so that all heads see
    what the last one does. Router losses of a mixture of experts are added to L_tr as they are,
    where its own loss has them; in a loop of your own, ask for them by ``auxiliary_of_forward()``.

    Args:
        backbone: called with ``output_hidden_states=True``; its ``hidden_states[0]`` are the
            embeddings.
        layers: of which hidden states the exits are, from the first exit to the last.
        heads: one module for each exit, or a single one that all share. Default None: the hidden
            states themselves are returned, for ``linear_exit_cross_entropy`` with the head of a
            language model.
        pooled: heads take the mean of the states over the tokens that the attention mask keeps, or
            over all positions of an image, [B, H], as a classifier does, and not every token's,
            [B, T, H].
        norm: what the states of earlier layers go through. Default None: the backbone's module that
            normalizes the last layer's, found in the first forward, if there is one.
            ``nn.Identity()`` for none.
        shift_labels: whether labels [B, T] are moved by one position, as a causal model does with
            them. Default None: if those of the first batch are its ``input_ids``, as collators for
            causal models give them, wherever they count; with ``inputs_embeds`` it must be said.

    Raises:
        ValueError: there is no layer, or not one head for each; or the backbone leaves out layers
            by chance, or balances routers in a way that is not known.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[int],
        heads: nn.Module | Sequence[nn.Module] | None = None,
        pooled: bool = False,
        *,
        norm: nn.Module | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__()
        if heads is not None and not isinstance(heads, nn.Module):
            heads = nn.ModuleList(heads)
        if not layers or (isinstance(heads, nn.ModuleList) and len(heads) != len(layers)):
            raise ValueError(f"`heads` must be one for each of `layers`, got {len(layers)} layers.")
        config = getattr(backbone, "config", None)
        for name, value in vars(config).items() if config is not None else ():
            if "layerdrop" in name and value:
                raise ValueError(
                    f"`backbone` must run every layer, got {name}={value} in its config: a layer "
                    f"that is left out has no exit. Load it with {name}=0.0."
                )
        self.backbone, self.layers, self.pooled = backbone, tuple(layers), pooled
        self.heads, self.norm = heads, norm
        self.align_target, self.auxiliary_of_forward = LabelShift(shift_labels), RouterLoss()
        self._norm_name: str | None = None  # in the backbone; "" for none

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> list[Tensor]:
        """What each exit says, [B, C], [B, T, C] or [B, T, H].

        Arguments are the backbone's; the first may stand without a name, whatever it is called.
        """
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self.align_target.shifts is None:
            self.align_target.tokens = input_ids
        if input_ids is not None:
            inputs[getattr(self.backbone, "main_input_name", "input_ids")] = input_ids

        def run() -> tuple[Any, Sequence[Tensor]]:
            output = self.backbone(**inputs, output_hidden_states=True)
            states = getattr(output, "decoder_hidden_states", None)
            return output, output.hidden_states if states is None else states

        if self.norm is None and self._norm_name is None:
            (output, every), self._norm_name = _with_final_norm(self.backbone, run)
        else:
            output, every = run()
        self.auxiliary_of_forward.look(self.backbone, output, attention_mask)
        states = [self._normed(every, layer, output) for layer in self.layers]
        # Feature maps [B, H, height, width] are rows of tokens too.
        states = [x.flatten(2).transpose(1, 2) if x.dim() > 3 else x for x in states]
        if self.pooled:
            states = [_mean_over_tokens(x, self._kept(x, inputs)) for x in states]
        if self.heads is None:
            return states
        if not isinstance(self.heads, nn.ModuleList):
            return [self.heads(state) for state in states]
        return [head(state) for head, state in zip(self.heads, states, strict=True)]

    def _normed(self, states: Sequence[Tensor], layer: int, output: Any) -> Tensor:
        """One of the states, through the norm if it has not been there."""
        state, norm = states[layer], self.norm
        if norm is None and self._norm_name and state.shape == states[-1].shape:
            norm = self.backbone.get_submodule(self._norm_name)
        # transformers gives most models' last state as it leaves the norm, to a head as well.
        is_last = state is getattr(output, "last_hidden_state", states[-1])
        return state if norm is None or is_last else norm(state)

    def _kept(self, state: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of a state count, [B, T], or None for all."""
        is_decoder = getattr(getattr(self.backbone, "config", None), "is_encoder_decoder", False)
        mask = inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
        if mask is None or mask.shape == state.shape[:2]:
            return mask
        resized = getattr(self.backbone, "_get_feature_vector_attention_mask", None)
        if resized is None or mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` must be of the shape {list(state.shape[:2])} of the hidden "
                f"states to take means over them, got {list(mask.shape)}."
            )
        found: Tensor = resized(state.shape[1], mask)  # audio: a state is of many samples
        return found

    @property
    def loss_type(self) -> str | None:
        """Tells the Trainer how labels are to be counted, where it is known before training."""
        return "ForCausalLM" if self.align_target.shifts else None

    def __getattr__(self, name: str) -> Any:
        """What else the Trainer asks of its model is the backbone's."""
        if name in _OF_THE_BACKBONE:
            return getattr(self.backbone, name)
        return super().__getattr__(name)


_OF_THE_BACKBONE = (
    "activation_checkpointing_enable",
    "config",
    "get_input_embeddings",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "main_input_name",
)


def _mean_over_tokens(state: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return state.mean(1)
    shares = kept.unsqueeze(-1).to(state.dtype)
    return (state * shares).sum(1) / shares.sum(1).clamp(min=1)


def _with_final_norm(
    backbone: nn.Module, run: Callable[[], tuple[Any, Sequence[Tensor]]]
) -> tuple[tuple[Any, Sequence[Tensor]], str]:
    """What the run gives, and the name of the norm that follows the last layer, "" if none does.

    It is the last norm outside of the numbered modules to be called after all of these, on states
    of the last layer's shape.
    """
    found: list[tuple[str, torch.Size | None]] = []

    def at_a_layer(*_: Any) -> None:
        found.clear()

    def at_a_norm(name: str) -> Callable[..., None]:
        return lambda _, __, output: found.append((name, getattr(output, "shape", None)))

    handles = []
    for name, module in backbone.named_modules():
        if any(part.isdecimal() for part in name.split(".")):
            handles.append(module.register_forward_hook(at_a_layer))
        elif "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(at_a_norm(name)))
    try:
        output, states = run()
    finally:
        for handle in handles:
            handle.remove()
    fitting = [name for name, shape in found if shape == states[-1].shape]
    return (output, states), fitting[-1] if fitting else ""
