"""The Trainer and Accelerate against the same training written as a loop."""

import copy
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cases import TRANSFORMER
from ranks import run_torchrun
from reweight import (
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)
from reweight._ranks.shards import whole
from reweight.integrations.huggingface import HiddenStateExits, MetaReweight

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
    backbone = LlamaModel(LlamaConfig(**TRANSFORMER, attention_dropout=0.0)).double()
    return HiddenStateExits(backbone, [1, 2], nn.Linear(8, 20).double())


def reweighter() -> SampleReweighter:
    torch.manual_seed(1)
    return SampleReweighter(num_exits=2).double()


def trainer_of(
    path: Path,
    *,
    accumulate: int = 1,
    batch: int = BATCH,
    model=None,
    meta=None,
    of_step=None,
    of_trainer=None,
    **options,
) -> tuple[nn.Module, MetaReweight, Trainer]:
    model = model or language_model()
    used = MetaReweight(reweighter(), meta or DataLoader(Tokens(2), batch), **of_step or {})
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
    given = {
        "train_dataset": Tokens(1),
        "callbacks": [used],
        "compute_loss_func": used.compute_loss,
    }
    return model, used, Trainer(model, arguments, **given | (of_trainer or {}))


def fit(path: Path, *, resume=None, also=None, **options):
    """Train, with one more callback."""
    model, used, trainer = trainer_of(path, **options)
    if also is not None:
        trainer.add_callback(also)
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


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 4), (2, 2)])
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


class Stops(TrainerCallback):
    """Does something at an event of the second step."""

    def __init__(self, event: str, act) -> None:
        def at(args, state, control, **kwargs) -> None:
            if state.global_step == (2 if event == "on_step_end" else 1):
                act(control, kwargs["model"])

        setattr(self, event, at)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end"])
def test_an_error_leaves_the_models_own_forward(tmp_path: Path, event: str, bf16: bool) -> None:
    model = language_model()

    def fail(control, model) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, model=model, bf16=bf16, also=Stops(event, fail))
    own = vars(model).get("forward")  # Accelerate's
    assert "left_out" not in own.__qualname__ if bf16 else own is None
    assert model(torch.zeros(2, 3, dtype=torch.int64))[0].shape == (2, 3, 20)


def test_so_does_an_error_of_the_step(tmp_path: Path) -> None:
    model = language_model()
    with pytest.raises(TypeError, match="`meta`"):
        fit(tmp_path, model=model, meta=[{}])
    assert "forward" not in vars(model)


def test_a_copy_of_the_model_is_one(tmp_path: Path) -> None:
    inputs, copies = torch.zeros(2, 3, dtype=torch.int64), []
    fit(tmp_path, also=Stops("on_step_end", lambda _, model: copies.append(copy.deepcopy(model))))
    for parameter in copies[0].parameters():
        parameter.data.zero_()
    assert not any(logits.any() for logits in copies[0](inputs))


class Returning(nn.Module):
    """The exits of a model in another form."""

    def __init__(self, form) -> None:
        super().__init__()
        self.model, self.form = language_model(), form

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        return self.form(self.model(input_ids, attention_mask))


EVALUATED = {"label_names": ["labels"], "per_device_eval_batch_size": BATCH}


class TestEvaluation:
    """The plain loss, and the logits of every exit."""

    def wanted(self, model: nn.Module, loss=exit_cross_entropy) -> tuple[float, list[Tensor]]:
        """Over batches of equal size, as the Trainer takes its mean."""
        losses, logits = [], []
        with torch.no_grad():
            for inputs, labels in map(pair, DataLoader(Tokens(3), BATCH)):
                logits.append(model(**inputs))
                found = loss(logits[-1], labels)
                losses.append(found.losses[found.valid].mean(0).sum())
        logits = [torch.cat(each) for each in zip(*logits, strict=True)]
        return torch.stack(losses).mean().item(), logits

    @pytest.mark.parametrize("bf16", [False, True])
    def test_while_training(self, tmp_path: Path, bf16: bool) -> None:
        seen = []

        def compute_metrics(prediction) -> dict[str, float]:
            seen.append(prediction)
            counted = prediction.label_ids != -100
            hits = [
                (logits.argmax(-1) == prediction.label_ids)[counted].mean()
                for logits in prediction.predictions
            ]
            return {f"accuracy_{k}": float(hit) for k, hit in enumerate(hits, start=1)}

        model, used, trainer = fit(
            tmp_path,
            bf16=bf16,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            of_trainer={"eval_dataset": Tokens(3), "compute_metrics": compute_metrics},
            **EVALUATED,
        )
        history = [each for each in trainer.state.log_history if "eval_loss" in each]
        assert len(seen) == len(history) == NUM_STEPS
        assert all({"eval_accuracy_1", "eval_accuracy_2"} <= set(each) for each in history)
        best = min(each["eval_loss"] for each in history)
        assert trainer.state.best_metric == best
        found = trainer.predict(Tokens(3))
        loss, logits = self.wanted(model)
        tolerance = {"rtol": 0, "atol": 1e-2 if bf16 else 1e-6}  # the Trainer keeps float32 losses
        torch.testing.assert_close(best, loss, **tolerance)
        torch.testing.assert_close(found.metrics["test_loss"], loss, **tolerance)
        assert len(found.predictions) == 2
        for each, wanted in zip(found.predictions, logits, strict=True):
            torch.testing.assert_close(torch.as_tensor(each), wanted.to(torch.as_tensor(each)))
        if not bf16:  # training is what it is without
            assert_same(used.reweighter, by_hand()[1].reweighter)

    def test_before_training_with_the_steps_loss_and_exits(self, tmp_path: Path) -> None:
        loss = partial(exit_cross_entropy, label_smoothing=0.5)
        model = Returning(lambda exits: {"exits": tuple(exits), "other": exits[0][:, 0]})
        _, _, trainer = trainer_of(
            tmp_path,
            model=model,
            of_step={"loss": loss, "exits": lambda outputs: outputs["exits"]},
            **EVALUATED,
        )
        found = trainer.predict(Tokens(3))
        wanted, logits = self.wanted(model.model, loss)
        torch.testing.assert_close(found.metrics["test_loss"], wanted, rtol=0, atol=1e-6)
        for each, other in zip(found.predictions[0], logits, strict=True):
            torch.testing.assert_close(torch.as_tensor(each), other)

    def test_weights_of_ones_own_and_a_loss_beside_count(self, tmp_path: Path) -> None:
        """As in training: of one batch, the train loss with learned weights of 1."""

        def loss(logits, target):
            weight = 1.0 + (target.flatten() % 3)
            beside = 0.1 * sum(each.square().mean() for each in logits)
            return exit_cross_entropy(logits, target)._replace(weight=weight, auxiliary=beside)

        options = {"form": "tanh", "average_over": "samples", "strength": 0.0}
        model, ones = language_model(), SampleReweighter(2, **options).double()
        used = MetaReweight(ones, DataLoader(Tokens(2), BATCH), loss=loss)
        _, _, trainer = trainer_of(
            tmp_path,
            model=model,
            of_trainer={"callbacks": [used], "compute_loss_func": used.compute_loss},
            learning_rate=0.0,
            max_steps=1,
            **EVALUATED,
        )
        trainer.train()
        found = trainer.evaluate(torch.utils.data.Subset(Tokens(1), range(BATCH)))["eval_loss"]
        assert found == pytest.approx(used.result.train_loss.item(), rel=1e-6)

    def test_of_a_mixture_of_experts_is_the_models_own(self, tmp_path: Path) -> None:
        """Router losses included, of one exit at the end; transformers takes both in float32."""
        torch.manual_seed(0)
        experts = {"num_local_experts": 4, "num_key_value_heads": 2}
        config = MixtralConfig(
            **TRANSFORMER, **experts, output_router_logits=True, router_aux_loss_coef=0.5
        )
        lm, data = MixtralForCausalLM(config), Repeated(3)
        model = HiddenStateExits(lm.model, [2], lm.lm_head, shift_labels=True)
        _, _, trainer = trainer_of(tmp_path / "exits", model=model, **EVALUATED)
        settings = TrainingArguments(
            str(tmp_path / "own"), per_device_eval_batch_size=BATCH, use_cpu=True,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        wanted = Trainer(lm, settings).evaluate(data)["eval_loss"]
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(wanted, rel=1e-5)

    def test_the_trainer_drops_the_first_of_what_is_no_list(self, tmp_path: Path) -> None:
        _, _, trainer = trainer_of(tmp_path, model=Returning(tuple), **EVALUATED)
        with pytest.warns(UserWarning, match="`model` must return a list of logits, got tuple"):
            trainer.evaluate(Tokens(3))

    def test_when_stopped_within_a_step(self, tmp_path: Path) -> None:
        """The forward that was to be left out did not come."""

        def stop(control, model) -> None:
            control.should_training_stop = True

        _, _, trainer = fit(
            tmp_path,
            accumulate=2,
            batch=2,
            also=Stops("on_substep_end", stop),
            eval_strategy="epoch",
            of_trainer={"eval_dataset": Tokens(3)},
            **EVALUATED,
        )
        assert trainer.state.log_history[-2]["eval_loss"] > 0

    def test_needs_the_names_of_the_labels(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`label_names` .* must be \['labels'\]"):
            fit(tmp_path, eval_strategy="steps", of_trainer={"eval_dataset": Tokens(3)})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        fit(tmp_path, remove_unused_columns=True)
    bare = [{"input_ids": torch.zeros(3, dtype=torch.int64)}] * 4
    with pytest.raises(ValueError, match=r"must have `labels`, got .*input_ids=.*") as error:
        fit(tmp_path, of_trainer={"train_dataset": bare})
    assert "remove_unused_columns" not in str(error.value)
    once = iter(list(DataLoader(Tokens(2), BATCH))[:2])
    with pytest.raises(ValueError, match="`meta` must begin anew"):
        fit(tmp_path, meta=once)
    with pytest.raises(ValueError, match=r"compute_loss_func=callback\.compute_loss too"):
        fit(tmp_path, of_trainer={"compute_loss_func": None})
    with pytest.raises(ValueError, match=r"callbacks=\[callback\] too"):
        fit(tmp_path, of_trainer={"callbacks": []})
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` .*got 0\.1.*loss=partial"):
        fit(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("meta", "got"),
    [
        (Tokens(2), r".*input_ids=torch.int64 \[6\]"),
        ([{"input_ids": [1, 2], "labels": 3}], "input_ids: list, labels: int"),
        ([(torch.zeros(4, 6), torch.zeros(4))], r".*2.*torch.float32 \[4, 6\]"),
        ([{"input_ids": torch.zeros(4, 6)}], r".*input_ids=torch.float32 \[4, 6\]"),
    ],
    ids=["dataset", "rows", "pairs", "no labels"],
)
def test_meta_batches_are_like_the_trainers(tmp_path: Path, meta, got: str) -> None:
    with pytest.raises(TypeError, match=f"`meta` must yield .*`labels` of 2 dimensions, got {got}"):
        fit(tmp_path, meta=meta)


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"`reweighter` must be .*the class SampleReweighter"):
        MetaReweight(SampleReweighter, [])
    with pytest.raises(TypeError, match="'intervall'"):
        MetaReweight(reweighter(), [], intervall=10)
    with pytest.raises(TypeError, match=r"multiple values .*'clip_grad_norm'"):
        MetaReweight(reweighter(), [], clip_grad_norm=1.0)


def test_options_reach_the_step(tmp_path: Path) -> None:
    """What the Trainer adds to the inputs is not a part of the batch, whose rows are drawn."""
    own = reweighter()
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
    before = copy.deepcopy(own.state_dict())
    used = MetaReweight(
        own,
        DataLoader(Tokens(2), BATCH),
        train_fraction=0.5,
        interval=2,
        reweighter_optimizer=optimizer,
    )
    given = {"callbacks": [used], "compute_loss_func": used.compute_loss}
    _, _, trainer = trainer_of(tmp_path, of_trainer=given)
    trainer.train()
    assert used.step.reweighter_optimizer is optimizer
    steps = [int(state["step"]) for state in optimizer.state.values()]
    assert set(steps) == {NUM_STEPS // 2}
    assert not any(map(torch.equal, before.values(), own.state_dict().values()))


def test_resumes(tmp_path: Path) -> None:
    whole, used, _ = fit(tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed, again, _ = fit(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(resumed, whole)
    assert_same(again.reweighter, used.reweighter)
    assert again.num_meta == used.num_meta == NUM_STEPS
    # Into another folder, which has a checkpoint of the same name from another run.
    fit(tmp_path / "b", meta=DataLoader(Tokens(4), BATCH), save_strategy="steps", save_steps=2)
    elsewhere, again, _ = fit(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(elsewhere, whole)
    assert_same(again.reweighter, used.reweighter)
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


@pytest.mark.skipif(
    "activation_checkpointing" not in signature(TrainingArguments).parameters,
    reason="older transformers checkpoint in a way that has no forward mode",
)
def test_activations_are_checkpointed_as_the_backbone_does(tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = BertModel(BertConfig(**TRANSFORMER), add_pooling_layer=False).double()
        model = HiddenStateExits(encoder, [1, 2], nn.Linear(8, 20).double())
        settings = {"activation_checkpointing": True} if checkpointing else {}
        fit(tmp_path, model=model, **settings)
        flags = [layer.gradient_checkpointing for layer in encoder.encoder.layer]
        assert flags == [checkpointing] * 2
        trained.append(model)
    assert_same(*trained)


def test_noise_in_the_embeddings_is_replayed(tmp_path: Path) -> None:
    """NEFTune's hook draws it anew in every forward; a wrong draw shows in the check."""
    model, used, trainer = fit(tmp_path, neftune_noise_alpha=5.0)
    assert used.result.backward_difference < 1e-6
    assert not model.get_input_embeddings()._forward_hooks
    assert trainer.neftune_noise_alpha == 5.0


class Repeated(Tokens):
    """Labels as transformers' collators for causal models give them."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.tokens[i].masked_fill(self.mask[i] == 0, -100)
        return {"input_ids": self.tokens[i], "attention_mask": self.mask[i], "labels": labels}


@pytest.mark.parametrize("wrapped", [False, True], ids=["HiddenStateExits", "a model of one's own"])
def test_labels_that_repeat_the_tokens_are_shifted(tmp_path: Path, wrapped: bool) -> None:
    """Trained and evaluated as with labels that are the next tokens."""

    def trained(data) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        model = Own() if wrapped else language_model()
        meta = DataLoader(data(2), BATCH)
        given = {"train_dataset": data(1), "eval_dataset": data(3)}
        _, _, trainer = fit(tmp_path, model=model, meta=meta, of_trainer=given, **EVALUATED)
        return model, trainer.evaluate()["eval_loss"]

    (model, loss), (wanted, other) = trained(Repeated), trained(Tokens)
    assert_same(model, wanted)
    assert loss == pytest.approx(other, rel=1e-6)


class Own(nn.Module):
    """Takes no part in what HiddenStateExits does with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8).double(), nn.Linear(8, 20).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        embedded = self.embedding(input_ids)
        return [self.head(embedded), self.head(embedded.tanh())]


def test_resumes_bitwise_with_meta_batches_in_random_order(tmp_path: Path) -> None:
    """Of which there are fewer than steps: the second order is another than the first."""

    def trained(resume=None):
        meta = DataLoader(Tokens(2, 3 * BATCH), BATCH, shuffle=True)
        torch.manual_seed(len(resume or ""))  # what is drawn before must not matter
        options = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
        return fit(tmp_path, resume=resume, model=language_model(), meta=meta, **options)

    whole, used, _ = trained()
    resumed, again, _ = trained(str(tmp_path / "checkpoint-2"))
    for name, found in resumed.state_dict().items():
        assert torch.equal(found, whole.state_dict()[name]), name
    for name, found in again.reweighter.state_dict().items():
        assert torch.equal(found, used.reweighter.state_dict()[name]), name


def on_two_ranks(function: str, path: Path) -> None:
    script = path / "ranks.py"
    script.write_text(
        f"from pathlib import Path; import {__name__} as t\nt.{function}(Path({str(path)!r}))"
    )
    run_torchrun(path / "output", str(script), seconds=300)


LOGGED = {"accumulate": 2, "logging_steps": 1}


def losses_of(trainer: Trainer) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def train_on_a_rank(path: Path) -> None:
    """Half of each batch, two of them accumulated, on copies of the model and on shards of it.

    Shards also go on from the checkpoint in the middle.
    """
    for kind in ("copies", "shards", "resumed"):
        settings = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        settings["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
        sharded = {"fsdp": True, "fsdp_config": settings}
        options = sharded if kind != "copies" else {}
        if kind == "shards":
            options = {**options, "save_strategy": "steps", "save_steps": 2}
        _, used, trainer = trainer_of(path, batch=1, ddp_backend="gloo", **LOGGED, **options)
        assert trainer.args.world_size == 2
        if kind != "copies":  # Accelerate shards nothing on CPUs, and says nothing of it
            plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
            trainer.accelerator.state._shared_state.update(
                distributed_type=DistributedType.FSDP, fsdp_plugin=plugin
            )
            trainer.is_fsdp_enabled = True
        resume = str(path / "checkpoint-2") if kind == "resumed" else None
        trainer.train(resume_from_checkpoint=resume)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        assert isinstance(next(model.parameters()), DTensor) == (kind != "copies")
        state = {name: whole(p.detach()) for name, p in model.named_parameters()}
        if trainer.args.process_index == 0:
            torch.save([state, used.step.state_dict(), losses_of(trainer)], path / f"{kind}.pt")


def test_two_processes_are_one_on_their_joined_batches(tmp_path: Path) -> None:
    """To 1e-10 in float64: the sums are in another order. The Trainer logs in float32."""
    on_two_ranks("train_on_a_rank", tmp_path)
    model, used, trainer = fit(tmp_path / "one", batch=2, **LOGGED)
    for kind in ("copies", "shards", "resumed"):
        found, state, losses = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        for name, wanted in model.named_parameters():
            torch.testing.assert_close(found[name], wanted.data, rtol=0, atol=1e-10, msg=name)
        for name, wanted in used.reweighter.state_dict().items():
            torch.testing.assert_close(state["reweighter"][name], wanted, rtol=0, atol=1e-10)
        assert losses == pytest.approx(losses_of(trainer), rel=1e-5), kind


def accelerate_on_a_rank(path: Path) -> None:
    """Prepared by Accelerate for two ranks, each with half of every batch."""
    accelerator = Accelerator(cpu=True)
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loaders = [DataLoader(Tokens(seed), BATCH // accelerator.num_processes) for seed in (1, 2)]
    model, optimizer, train, meta = accelerator.prepare(model, optimizer, *loaders)
    step = MetaReweightStep(model, optimizer.optimizer, reweighter())
    for batch, other in zip(train, meta, strict=True):
        optimizer.zero_grad()
        step.backward(pair(batch), pair(other))
        optimizer.step()
    if accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), path / "accelerated.pt")
    accelerator.end_training()


def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    """To 1e-10 in float64, one process on the joined batches."""
    on_two_ranks("accelerate_on_a_rank", tmp_path)
    found = torch.load(tmp_path / "accelerated.pt", weights_only=True)
    accelerate_on_a_rank(tmp_path)
    for name, wanted in torch.load(tmp_path / "accelerated.pt", weights_only=True).items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-10, msg=name)
