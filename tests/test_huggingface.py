"""The Trainer and Accelerate against the same training written as a loop."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Trainer, TrainingArguments

from reweight import (
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
    linear_exit_cross_entropy,
)
from reweight.integrations.huggingface import HiddenStateExits, MetaReweight

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BATCH, NUM_STEPS, LENGTH = 4, 4, 6


class Tokens(Dataset):
    """Sequences of unequal numbers of labels."""

    def __init__(self, seed: int, num: int = NUM_STEPS * BATCH) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(20, (num, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH + 1, (num, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.tokens[i].roll(-1).masked_fill(self.mask[i].roll(-1) == 0, -100)
        labels[-1] = -100
        return {"input_ids": self.tokens[i], "attention_mask": self.mask[i], "labels": labels}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    backbone = LlamaModel(LlamaConfig(**SMALL, attention_dropout=0.0)).double()
    return HiddenStateExits(backbone, [1, 2], nn.Linear(8, 20).double())


def reweighter() -> SampleReweighter:
    torch.manual_seed(1)
    return SampleReweighter(num_exits=2).double()


def fit(path: Path, *, accumulate: int = 1, batch: int = BATCH, resume=None, meta=None, **options):
    model = language_model()
    used = MetaReweight(reweighter(), meta or DataLoader(Tokens(2), batch))
    settings = {
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(
        str(path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **settings | options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Tokens(1),
        callbacks=[used],
        compute_loss_func=used.compute_loss,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, used, trainer


def pair(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return batch, batch.pop("labels")


def by_hand(*, accumulate: int = 1, batch: int = BATCH) -> tuple[nn.Module, MetaReweightStep]:
    """The loop that the Trainer stands for: sums over all labels that are accumulated."""
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / NUM_STEPS)
    step = MetaReweightStep(model, optimizer, reweighter(), clip_grad_norm=1.0)
    trains, metas = ([pair(b) for b in DataLoader(Tokens(s), batch)] for s in (1, 2))
    for first in range(0, NUM_STEPS * accumulate, accumulate):
        chosen = slice(first, first + accumulate)
        total = sum((target != -100).sum() for _, target in trains[chosen])
        optimizer.zero_grad()
        for train, meta in zip(trains[chosen], metas[chosen], strict=True):
            step.backward(train, meta, scale=(train[1] != -100).sum().item() / total.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, step


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for (name, found), wanted in zip(
        module.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 4), (4, 1)])
def test_the_trainer_is_the_loop(tmp_path: Path, accumulate: int, batch: int) -> None:
    """To 1e-12 in float64: the clipping factor is computed in another way."""
    model, used, _ = fit(tmp_path, accumulate=accumulate, batch=batch)
    wanted, step = by_hand(accumulate=accumulate, batch=batch)
    assert_same(model, wanted)
    assert_same(used.reweighter, step.reweighter)
    assert torch.isfinite(used.result.meta_loss)
    assert "forward" not in vars(model)


def test_low_precision(tmp_path: Path) -> None:
    """Accelerate wraps the forward in autocast, on the object, where it is found again."""
    model, used, _ = fit(tmp_path, bf16=True)
    assert torch.isfinite(used.result.meta_loss)
    assert used.result.hypergradient_norm > 0
    assert not used.step.num_skipped
    assert "left_out" not in vars(model)["forward"].__qualname__


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        fit(tmp_path, remove_unused_columns=True)
    once = iter(list(DataLoader(Tokens(2), BATCH))[:2])
    with pytest.raises(ValueError, match="`meta` must begin anew"):
        fit(tmp_path, meta=once)


def test_resumes(tmp_path: Path) -> None:
    whole, used, _ = fit(tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed, again, _ = fit(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(resumed, whole)
    assert_same(again.reweighter, used.reweighter)
    assert again.num_meta == used.num_meta == NUM_STEPS
    (tmp_path / "a" / "checkpoint-2" / "reweight.pt").unlink()
    with pytest.raises(ValueError, match="must hold the state"):
        fit(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"))


def test_accelerate_needs_no_integration(tmp_path: Path) -> None:
    """Prepared, accumulated and resumed, a step is that of the loop without Accelerate."""

    def train(steps: int, start: int = 0) -> tuple[nn.Module, MetaReweightStep]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = language_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        step = MetaReweightStep(model, optimizer.optimizer, reweighter())
        accelerator.register_for_checkpointing(step)
        if start:
            accelerator.load_state(tmp_path / "state")
        pairs = zip(*(map(pair, DataLoader(Tokens(s), BATCH)) for s in (1, 2)), strict=True)
        for batch, meta in list(pairs)[start:steps]:
            with accelerator.accumulate(model):
                step.backward(batch, meta, scale=1 / accelerator.gradient_accumulation_steps)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(tmp_path / "state")
        return model, step

    model, step = train(NUM_STEPS)
    train(2)
    resumed, again = train(NUM_STEPS, start=2)
    assert_same(resumed, model)
    assert_same(again.reweighter, step.reweighter)


class TestHiddenStateExits:
    def test_an_encoder_pools_what_the_mask_keeps(self) -> None:
        torch.manual_seed(0)
        encoder = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
        model = HiddenStateExits(encoder, [1, 2], [nn.Linear(8, 3), nn.Linear(8, 3)], pooled=True)
        inputs = Tokens(3)[0]
        num = int(inputs["attention_mask"].sum())
        found = model(inputs["input_ids"][None], inputs["attention_mask"][None])
        states = encoder(inputs["input_ids"][None, :num], output_hidden_states=True).hidden_states
        for k in (1, 2):
            wanted = model.heads[k - 1](states[k].mean(1))
            torch.testing.assert_close(found[k - 1], wanted)

    def test_a_decoder_shares_its_head(self) -> None:
        model = language_model()
        bare = HiddenStateExits(model.backbone, [1, 2])
        inputs, labels = pair(next(iter(DataLoader(Tokens(1), BATCH))))
        found = linear_exit_cross_entropy(
            bare(**inputs), model.heads.weight, labels, model.heads.bias
        )
        wanted = exit_cross_entropy(model(**inputs), labels)
        torch.testing.assert_close(found.losses, wanted.losses)

    def test_heads_are_as_many_as_layers(self) -> None:
        with pytest.raises(ValueError, match="one for each of `layers`"):
            HiddenStateExits(nn.Identity(), [1, 2], [nn.Linear(8, 3)])
