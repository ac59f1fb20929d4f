"""Exits of small random models of transformers, and their labels, against transformers itself."""

import copy
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from cases import TRANSFORMER
from ranks import process_group, run_ranks
from reweight import (
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
    linear_exit_cross_entropy,
)
from reweight.integrations.hidden_states import HiddenStateExits, LabelShift

SEQ2SEQ = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}
AUDIO = {
    "conv_dim": (4, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "feat_extract_norm": "layer",
}
ENCODER = {name: value for name, value in TRANSFORMER.items() if name != "vocab_size"}


def made(name: str, **options) -> nn.Module:
    """A model of transformers with random parameters, in float64 and without dropout."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config).double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 20, shape)


def text() -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": tokens(2, 5), "attention_mask": mask}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8).double()}


def both() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tokens(2, 4)}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 40).double()}


T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
SWIN = {
    **IMAGES,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
MODELS = {
    "BERT": ("Bert", TRANSFORMER, text, ""),
    "DistilBERT": (
        "DistilBert",
        {"vocab_size": 20, "dim": 8, "n_layers": 2, "n_heads": 2},
        text,
        "",
    ),
    "Llama": ("Llama", TRANSFORMER, text, "norm"),
    "GPT-2": ("GPT2", {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2}, text, "ln_f"),
    "OPT": (
        "OPT",
        {**TRANSFORMER, "ffn_dim": 16, "word_embed_proj_dim": 8},
        text,
        "decoder.final_layer_norm",
    ),
    "ViT": ("ViT", {**ENCODER, **IMAGES}, pixels, "layernorm"),
    "DINOv2": ("Dinov2", {**ENCODER, **IMAGES}, pixels, "layernorm"),
    "CLIP's images": ("CLIPVision", {**ENCODER, **IMAGES}, pixels, ""),
    "ConvNeXt": (
        "ConvNext",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        pixels,
        "",
    ),
    "wav2vec 2.0": ("Wav2Vec2", {**ENCODER, **AUDIO, "layerdrop": 0.0}, sound, ""),
    "wav2vec 2.0, norm first": (
        "Wav2Vec2",
        {**ENCODER, **AUDIO, "layerdrop": 0.0, "do_stable_layer_norm": True},
        sound,
        "encoder.layer_norm",
    ),
    "BART": ("Bart", SEQ2SEQ, both, ""),
    "mBART": ("MBart", SEQ2SEQ, both, "decoder.layer_norm"),
    "T5": ("T5", T5, both, "decoder.final_layer_norm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_exit_sees_what_the_last_one_does(name: str) -> None:
    """The last exit is of the last hidden state; earlier ones go through the norm before it."""
    kind, options, batch, norm = MODELS[name]
    backbone, inputs = made(kind, **options), batch()
    model = HiddenStateExits(backbone, [1, 2])
    first, last = model(**inputs)
    assert model._norm_name == norm
    output = backbone(**inputs, output_hidden_states=True)
    states = getattr(output, "decoder_hidden_states", None) or output.hidden_states
    wanted = backbone.get_submodule(norm)(states[1]) if norm else states[1]
    shaped = [x.flatten(2).transpose(1, 2) if x.dim() == 4 else x for x in (wanted, states[-1])]
    torch.testing.assert_close(first, shaped[0])
    if norm:  # or CLIP, whose last state is taken as it is
        shaped[1] = output.last_hidden_state
    torch.testing.assert_close(last, shaped[1])
    torch.testing.assert_close(model(**inputs)[0], first, msg="found once, the norm stays")


@pytest.mark.parametrize("name", ["BERT", "Llama", "ViT", "wav2vec 2.0", "T5", "ConvNeXt"])
def test_the_step_trains_them(name: str) -> None:
    """Exactly: the check of both ways is at the size of rounding, of parts in float32 (RMSNorm)."""
    kind, options, batch, _ = MODELS[name]
    heads = [nn.Linear(8, 3).double() for _ in range(2)]
    model = HiddenStateExits(made(kind, **options), [1, 2], heads, pooled=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=2).double())
    target = torch.tensor([0, 2])
    result = step((batch(), target), (batch(), target))
    assert step.estimator == "auto"
    assert result.hypergradient_norm > 0
    assert result.backward_difference < 1e-6


def test_stages_of_other_widths_are_left_without_the_last_ones_norm() -> None:
    backbone, inputs = made("Swin", **SWIN), pixels()
    first, last = HiddenStateExits(backbone, [0, -1], pooled=True)(**inputs)
    output = backbone(**inputs, output_hidden_states=True)
    torch.testing.assert_close(first, output.hidden_states[0].mean(1))
    torch.testing.assert_close(last, output.last_hidden_state.mean(1))


def test_the_norm_can_be_given() -> None:
    backbone, inputs = made("Llama", **TRANSFORMER), text()
    states = backbone(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        HiddenStateExits(backbone, [1], norm=nn.Identity())(**inputs)[0], states[1]
    )
    own = nn.LayerNorm(8).double()
    torch.testing.assert_close(
        HiddenStateExits(backbone, [1], norm=own)(**inputs)[0], own(states[1])
    )


def test_an_encoder_pools_what_the_mask_keeps() -> None:
    encoder, inputs = made("Bert", **TRANSFORMER), text()
    model = HiddenStateExits(encoder, [1, 2], [nn.Linear(8, 3).double() for _ in "ab"], pooled=True)
    found = model(inputs["input_ids"][1:], inputs["attention_mask"][1:])
    states = encoder(inputs["input_ids"][1:, :3], output_hidden_states=True).hidden_states
    for k in (1, 2):
        torch.testing.assert_close(found[k - 1], model.heads[k - 1](states[k].mean(1)))


def test_audio_pools_what_the_mask_of_its_samples_keeps() -> None:
    kind, options, _, _ = MODELS["wav2vec 2.0, norm first"]
    encoder, inputs = made(kind, **options), sound()
    mask = (torch.arange(40) < torch.tensor([[40], [20]])).long()
    model = HiddenStateExits(encoder, [2], pooled=True)
    [found] = model(**inputs, attention_mask=mask)
    states = encoder(**inputs, attention_mask=mask).last_hidden_state
    for row, length in enumerate((40, 20)):
        num = int(encoder._get_feat_extract_output_lengths(length))
        torch.testing.assert_close(found[row], states[row, :num].mean(0))
    images = HiddenStateExits(nn.Identity(), [1], pooled=True)
    with pytest.raises(ValueError, match=r"`attention_mask` must be of the shape \[2, 5\]"):
        images._kept(torch.zeros(2, 5, 8), {"attention_mask": mask})


def test_embeddings_in_place_of_tokens() -> None:
    decoder, inputs = made("Llama", **TRANSFORMER), text()
    model = HiddenStateExits(decoder, [1, 2], pooled=True)
    wanted = model(**inputs)
    embedded = decoder.embed_tokens(inputs.pop("input_ids"))
    found = model(inputs_embeds=embedded, **inputs)
    torch.testing.assert_close(found, wanted)


def test_layers_left_out_by_chance_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layerdrop=0\.1 .*Load it with layerdrop=0\.0"):
        HiddenStateExits(made("Wav2Vec2", **ENCODER, **AUDIO, layerdrop=0.1), [1])
    with pytest.raises(ValueError, match=r"decoder_layerdrop=0\.5"):
        HiddenStateExits(made("Bart", **SEQ2SEQ, decoder_layerdrop=0.5), [1])


def test_a_decoder_shares_its_head() -> None:
    backbone, head = made("Llama", **TRANSFORMER), nn.Linear(8, 20).double()
    inputs, labels = text(), tokens(2, 5)
    found = linear_exit_cross_entropy(
        HiddenStateExits(backbone, [1, 2])(**inputs), head.weight, labels, head.bias
    )
    wanted = exit_cross_entropy(HiddenStateExits(backbone, [1, 2], head)(**inputs), labels)
    torch.testing.assert_close(found.losses, wanted.losses)


def test_heads_are_as_many_as_layers() -> None:
    with pytest.raises(ValueError, match="one for each of `layers`"):
        HiddenStateExits(nn.Identity(), [1, 2], [nn.Linear(8, 3)])


class TestLabels:
    """As transformers shifts them."""

    def language_model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TRANSFORMER)).double()

    def batch(self) -> dict[str, Tensor]:
        """By transformers' own collator: of unequal lengths, padded."""
        transformers.utils.logging.set_verbosity_error()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_whitespace(), pad_token="[PAD]"
        )
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = [tokens(6).tolist(), tokens(4).tolist()]
        return dict(collate([{"input_ids": row} for row in rows]))

    def test_of_its_collator_are_shifted_as_it_does(self) -> None:
        lm, batch = self.language_model(), self.batch()
        assert (batch["labels"] == -100).sum() == 2
        model = HiddenStateExits(lm.model, [1, 2], lm.lm_head)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=2).double())
        wanted = lm(**batch).loss.double()  # of transformers in float32
        labels = batch.pop("labels")
        result = step.backward((batch, labels), (batch, labels))
        losses = result.losses
        found = losses.mean_over_samples(losses.losses)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    def test_the_next_tokens_are_left_as_they_are(self) -> None:
        rows = tokens(2, 6)
        shift = LabelShift()
        assert shift(rows[:, :-1], rows[:, 1:]) is not None
        assert shift.shifts is False
        torch.testing.assert_close(shift(rows[:, :-1], rows[:, 1:]), rows[:, 1:])

    def test_labels_that_do_not_count_say_nothing(self) -> None:
        rows, shift = tokens(2, 6), LabelShift()
        shift(rows, torch.full((2, 6), -100))
        assert shift.shifts is None
        labels = rows.masked_fill(torch.arange(6) < 3, -100)  # of a prompt
        wanted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
        assert torch.equal(shift({"input_ids": rows}, labels), wanted)

    def test_classes_and_probabilities_are_no_tokens(self) -> None:
        for labels in (tokens(4), torch.rand(4, 3)):
            shift = LabelShift()
            assert shift(tokens(4, 6), labels) is labels

    def test_can_be_said(self) -> None:
        rows = tokens(2, 6)
        model = HiddenStateExits(made("Llama", **TRANSFORMER), [1], shift_labels=False)
        assert model.align_target(rows, rows) is rows
        assert model.loss_type is None
        said = HiddenStateExits(model.backbone, [1], shift_labels=True)
        assert said.loss_type == "ForCausalLM"
        assert said.align_target(None, rows)[0, -1] == -100

    @pytest.mark.parametrize("mask", [False, True])
    def test_must_be_said_where_embeddings_take_the_place_of_tokens(self, mask: bool) -> None:
        """With a mask too, which is as long as the labels and of their dtype."""
        lm, rows = self.language_model(), tokens(2, 6)
        batch = {"inputs_embeds": lm.model.embed_tokens(rows).detach()}
        batch |= {"attention_mask": torch.ones_like(rows)} if mask else {}
        wanted = lm(**batch, labels=rows).loss.double()  # of transformers in float32
        for shift in (None, True):
            model = HiddenStateExits(lm.model, [2], lm.lm_head, shift_labels=shift)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1).double())
            if shift is None:
                with pytest.raises(ValueError, match="`shift_labels` must be True or False"):
                    step.backward((batch, rows), (batch, rows))
            else:
                losses = step.backward((batch, rows), (batch, rows)).losses
                found = losses.mean_over_samples(losses.losses)[0]
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    def test_are_found_inside_of_another_model(self) -> None:
        model = nn.Sequential(
            HiddenStateExits(made("Llama", **TRANSFORMER), [1], nn.Linear(8, 20).double())
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1).double())
        rows = tokens(2, 6)
        result = step.backward((rows, rows), (rows, rows))
        assert result.losses.valid.view(2, 6)[:, -1].tolist() == [False, False]


EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
}


class TestRouters:
    """A mixture of experts balances them by a loss of its own, which no weight is for."""

    def language_model(self, name: str, dtype=torch.float64, **options) -> nn.Module:
        torch.manual_seed(0)
        sizes = {
            **TRANSFORMER,
            "num_key_value_heads": 2,
            "router_aux_loss_coef": 0.5,
            **EXPERTS[name],
        }
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
        if dtype == torch.float64:
            config._experts_implementation = "eager"  # the default has no float64
        return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)
        inputs = text()
        return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(self, lm: nn.Module) -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
        lm.zero_grad()
        return found

    def by_the_step(self, lm: nn.Module, backbone: nn.Module, num_exits: int = 1) -> float:
        """What a step with weights of 1 adds to the gradients; its train loss."""
        layers, head = [1, 2][-num_exits:], lm.lm_head
        model = HiddenStateExits(backbone, layers, head, shift_labels=True)
        options = {"form": "tanh", "average_over": "samples", "strength": 0.0}
        reweighter = SampleReweighter(num_exits, **options).to(head.weight.dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = MetaReweightStep(model, optimizer, reweighter)
        result = step.backward(self.batch(), self.batch())
        assert result.backward_difference < (1e-6 if head.weight.dtype == torch.float64 else 1e-4)
        return result.train_loss.item()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", EXPERTS)
    def test_their_loss_is_the_models_own(self, name: str, dtype: torch.dtype) -> None:
        """Of one exit at the end, with weights of 1; transformers takes both in float32."""
        lm = self.language_model(name, dtype, output_router_logits=True)
        inputs, labels = self.batch()
        own = lm(**inputs, labels=labels)
        assert own.aux_loss > 0.5
        own.loss.backward()
        wanted = self.gradients(lm)
        for backbone in (lm.model, lm):  # which gives its `aux_loss` itself
            loss = self.by_the_step(lm, backbone)
            assert loss == pytest.approx(own.loss.item(), rel=1e-5)
            for each, found in self.gradients(lm).items():
                torch.testing.assert_close(found, wanted[each], rtol=1e-4, atol=1e-6, msg=each)

    def test_it_is_added_once_whatever_the_number_of_exits(self) -> None:
        found = []
        for balanced in (True, False):
            lm = self.language_model("Mixtral", output_router_logits=balanced)
            self.by_the_step(lm, lm.model, num_exits=2)
            found.append(self.gradients(lm))
        inputs, _ = self.batch()
        lm = self.language_model("Mixtral")
        (0.5 * lm(**inputs, output_router_logits=True).aux_loss).backward()
        for each, alone in self.gradients(lm).items():
            both = found[1][each] + alone
            torch.testing.assert_close(found[0][each], both, rtol=1e-4, atol=1e-6, msg=each)

    def test_it_is_asked_for_once_and_no_part_of_a_copy(self) -> None:
        lm = self.language_model("Mixtral", output_router_logits=True)
        model, (inputs, _) = HiddenStateExits(lm.model, [2], lm.lm_head), self.batch()
        model(**inputs)
        copied = copy.deepcopy(model)
        assert copied.auxiliary_of_forward() is None
        own = lm(**inputs).aux_loss
        torch.testing.assert_close(model.auxiliary_of_forward(), 0.5 * own)
        assert model.auxiliary_of_forward() is None
        lm.config.output_router_logits = False
        model(**inputs)
        assert model.auxiliary_of_forward() is None

    def test_what_is_not_known_is_refused(self) -> None:
        torch.manual_seed(0)
        options = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
        config = transformers.SwitchTransformersConfig(**options, output_router_logits=True)
        model = HiddenStateExits(transformers.SwitchTransformersModel(config), [1])
        with pytest.raises(
            ValueError, match=r"got SwitchTr.*Load it with output_router_logits=Fal"
        ):
            model(**both())


class InHalves(HiddenStateExits):
    """Runs the halves of a batch one by one, as two ranks do; its router loss is their mean."""

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        exits, losses = [], []
        for half in range(2):
            rows = {name: value.chunk(2)[half] for name, value in inputs.items()}
            exits.append(super().forward(**rows))
            losses.append(self.auxiliary_of_forward())
        if None not in losses:
            self.auxiliary_of_forward.found = torch.stack(losses).mean()
        return [torch.cat(halves) for halves in zip(*exits, strict=True)]


def trained_experts(
    kind: type[HiddenStateExits] = HiddenStateExits, rank: int | None = None, balanced: bool = True
) -> Tensor:
    """The parameters of the model and the reweighter after three steps, of a rank or of all."""
    lm = TestRouters().language_model("Mixtral", output_router_logits=balanced)
    model = inner = kind(lm.model, [1, 2], lm.lm_head, shift_labels=True)
    reweighter = SampleReweighter(num_exits=2, num_hidden=4).double()
    if rank is not None:
        model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = torch.optim.SGD(reweighter.parameters(), lr=1.0)
    step = MetaReweightStep(model, optimizer, reweighter, reweighter_optimizer=own)
    for seed in range(3):
        torch.manual_seed(seed)
        train, meta = tokens(2, 4, 6).unbind()
        if rank is not None:
            train, meta = train.chunk(2)[rank], meta.chunk(2)[rank]
        step(*(({"input_ids": rows}, rows) for rows in (train, meta)))
    modules = (inner, reweighter)
    return torch.cat([p.detach().flatten() for each in modules for p in each.parameters()])


def train_experts_on_a_rank(rank: int, folder: str) -> None:
    with process_group(rank, 2, f"file://{folder}/store"):
        torch.save(trained_experts(rank=rank), Path(folder, f"{rank}.pt"))


def test_router_losses_of_two_ranks_are_averaged(tmp_path: Path) -> None:
    """As DistributedDataParallel does with losses; transformers takes them in float32."""
    run_ranks(2, train_experts_on_a_rank, str(tmp_path), seconds=60)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained_experts(InHalves), rtol=0, atol=1e-7)
    # A router loss is no mean over tokens, so that of the joined batch is another.
    for other in (trained_experts(), trained_experts(InHalves, balanced=False)):
        assert (first - other).abs().max() > 1e-4


def _whitespace():
    """A tokenizer that nothing is looked up in: the collator pads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))


def test_checkpointed_activations_are_the_backbones() -> None:
    model = HiddenStateExits(BertModel(BertConfig(**TRANSFORMER)), [1])
    for name in ("get_input_embeddings", "gradient_checkpointing_enable"):
        assert getattr(model, name) == getattr(model.backbone, name)
    assert "input_ids" in signature(model.forward).parameters
    decoder = LlamaModel(LlamaConfig(**TRANSFORMER))
    assert isinstance(HiddenStateExits(decoder, [1]).config, LlamaConfig)
