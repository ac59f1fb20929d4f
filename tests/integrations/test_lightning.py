"""The Lightning callback against the same training written as a loop, and through the Trainer."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_exits
from ranks import run_torchrun
from reweight import MetaReweightStep, SampleReweighter, exit_cross_entropy
from reweight.integrations.lightning import MetaReweight

NUM_STEPS, BATCH = 4, 8
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Exits(LightningModule):
    """Two exits, BatchNorm and momentum: what a wrong order of events would show in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU())
        self.exits = nn.ModuleList([nn.Linear(10, 3), nn.Linear(10, 3)])
        self.losses: list[Tensor] = []

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features = self.body(inputs)
        return [each(features) for each in self.exits]

    def training_step(self, batch, batch_idx):
        (inputs, target), _ = batch
        return exit_cross_entropy(self(inputs), target).losses.mean(0).sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"])


def samples(seed: int, num: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (num,), generator=generator))


def loader(num_steps: int = NUM_STEPS) -> CombinedLoader:
    parts = [DataLoader(samples(seed, num_steps * BATCH), BATCH) for seed in (1, 2)]
    return CombinedLoader(parts, "min_size")


def callback(**options) -> MetaReweight:
    torch.manual_seed(1)
    return MetaReweight(SampleReweighter(num_exits=2), **options)


def fit(
    module: Exits,
    *callbacks: Callback,
    max_steps: int = NUM_STEPS,
    num_batches: int = NUM_STEPS,
    path=None,
    train=None,
    **options,
):
    trainer = Trainer(
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        **QUIET | options,
    )
    trainer.fit(
        module, loader(num_batches) if train is None else train, ckpt_path=path, weights_only=True
    )
    return trainer


def by_hand(
    *, accumulate: int = 1, autocast=None, scaler=None, max_norm=None, after_step=None
) -> tuple[Exits, MetaReweightStep]:
    """The loop that the Trainer stands for."""
    module = Exits()
    [optimizer], [schedule] = module.configure_optimizers()
    torch.manual_seed(1)
    reweighter = SampleReweighter(num_exits=2)
    step = MetaReweightStep(module, optimizer, reweighter, clip_grad_norm=max_norm, scaler=scaler)
    for index, (train, meta) in enumerate(zip(*loader().iterables, strict=True)):
        if index % accumulate == 0:
            optimizer.zero_grad()
        # As the Trainer's: a cache of casts would add up gradients in low precision.
        with torch.autocast(
            "cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False
        ):
            step.backward(train, meta, scale=1 / accumulate)
        if index % accumulate == accumulate - 1:
            if scaler is not None:
                scaler.unscale_(optimizer)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), max_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            schedule["scheduler"].step()
            if after_step is not None:
                after_step(module)
    return module, step


def assert_bitwise(module: nn.Module, other: nn.Module) -> None:
    for (name, found), wanted in zip(
        module.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2, "max_steps": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.05}, {"max_norm": 0.05}),
        ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
        ({"precision": "16-mixed"}, {"autocast": torch.float16, "scaler": True}),
        (
            {"precision": "16-mixed", "gradient_clip_val": 0.05},
            {"autocast": torch.float16, "scaler": True, "max_norm": 0.05},
        ),
    ],
)
def test_fit_is_the_loop_bitwise(options, loop) -> None:
    plugins = {}
    if loop.get("scaler"):
        from lightning.pytorch.plugins import MixedPrecision

        options, loop = dict(options), dict(loop)
        options.pop("precision")
        scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
        plugins["plugins"] = [MixedPrecision("16-mixed", "cpu", scalers[0])]
        loop["scaler"] = scalers[1]
    module, used = Exits(), callback()
    fit(module, used, **options, **plugins)
    wanted, step = by_hand(**loop)
    assert_bitwise(module, wanted)
    assert_bitwise(used.reweighter, step.reweighter)
    fresh = callback().reweighter.state_dict().values()
    learnt = used.reweighter.state_dict().values()
    assert not all(map(torch.equal, learnt, fresh)), "the reweighter has learnt nothing"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resumes_bitwise(tmp_path: Path) -> None:
    """With one batch, as Lightning does not go on where a plain loader was."""
    whole, used = Exits(), callback()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, used, saving, num_batches=1, enable_checkpointing=True)
    resumed, again = Exits(), callback()
    saving, path = ModelCheckpoint(dirpath=tmp_path), tmp_path / "epoch=0.ckpt"
    fit(resumed, again, saving, num_batches=1, path=path, enable_checkpointing=True)
    assert len(resumed.losses) == NUM_STEPS - 1
    assert_bitwise(resumed, whole)
    assert_bitwise(again.reweighter, used.reweighter)


class ByHand(Exits):
    """Calls a step of its own, whose state goes into the module's checkpoint."""

    saved = None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        [optimizer], _ = super().configure_optimizers()
        torch.manual_seed(1)
        self.step = MetaReweightStep(self, optimizer, SampleReweighter(num_exits=2))
        if self.saved is not None:
            self.step.load_state_dict(self.saved)
        return optimizer

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        result = self.step.backward(*batch)
        optimizer.step()
        return result.train_loss

    def on_save_checkpoint(self, checkpoint):
        checkpoint["reweight"] = self.step.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.saved = checkpoint["reweight"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:`training_step` returned")
def test_a_step_made_by_hand_resumes_bitwise(tmp_path: Path) -> None:
    whole, resumed = ByHand(), ByHand()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, saving, num_batches=1, enable_checkpointing=True)
    saving, path = ModelCheckpoint(dirpath=tmp_path), tmp_path / "epoch=0.ckpt"
    fit(resumed, saving, num_batches=1, path=path, enable_checkpointing=True)
    assert resumed.step.state_dict()["num_calls"] == NUM_STEPS
    assert len(resumed.losses) == NUM_STEPS - 1
    assert_bitwise(resumed, whole)
    assert_bitwise(resumed.step.reweighter, whole.step.reweighter)


class Normalized(Exits):
    """Its first statistics are of the inputs alone, so that they are known."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(0, nn.BatchNorm1d(6))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestWeightAveraging:
    @pytest.mark.parametrize("lagged", [False, True])
    def test_the_last_epoch_takes_the_statistics_of_the_train_data(self, lagged: bool) -> None:
        """A cumulative mean over the batches, in float32."""
        module, used = Normalized(), callback(lagged=lagged)
        averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        train = loader().iterables[0] if lagged else loader()
        fit(module, used, averaging, max_steps=-1, max_epochs=2, train=train)
        batches = [inputs for inputs, _ in loader().iterables[0]]
        norm = module.body[0]
        wanted = torch.stack([inputs.mean(0) for inputs in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, wanted)
        wanted = torch.stack([inputs.var(0) for inputs in batches]).mean(0)
        torch.testing.assert_close(norm.running_var, wanted)
        assert norm.num_batches_tracked == NUM_STEPS
        assert used.step.state_dict()["num_calls"] == 2 * NUM_STEPS, "it trains in these no more"

    def test_an_exponential_mean_is_that_of_the_loop(self) -> None:
        """Of parameters and buffers, to rounding: both take the mean in float32."""
        module = Exits()
        fit(module, callback(), EMAWeightAveraging(decay=0.5))
        states: list[dict[str, Tensor]] = []
        by_hand(after_step=lambda module: states.append(_copy_of(module)))
        for name, found in module.state_dict().items():
            if not found.is_floating_point():
                continue
            wanted = states[0][name]
            for state in states[1:]:
                wanted = torch.lerp(wanted, state[name], 0.5)
            torch.testing.assert_close(found, wanted, msg=name)


def _copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Unequal(Exits):
    """Tokens that count are few in one batch and many in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Identity()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ragged(*counts: int) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for seed, count in enumerate(counts):
        inputs, target = samples(seed, BATCH).tensors
        batches.append((inputs, target.where(torch.arange(BATCH) < count, -100)))
    return batches


def test_a_mean_over_all_tokens_that_are_accumulated() -> None:
    """With weights of 1, to rounding, that of both batches in one; in float32."""
    batches = ragged(1, 8, 3, 0)
    options = {"form": "tanh", "average_over": "samples", "strength": 0.0}
    used = MetaReweight(
        SampleReweighter(num_exits=2, **options), count=lambda target: (target != -100).sum()
    )
    module, wanted = Unequal(), Unequal()
    train = DataLoader(list(zip(batches, batches, strict=True)), batch_size=None)
    fit(module, used, max_steps=2, accumulate_grad_batches=2, train=train)
    optimizer = wanted.configure_optimizers()
    for first in (0, 2):
        inputs, target = (torch.cat(each) for each in zip(*batches[first : first + 2], strict=True))
        losses = exit_cross_entropy(wanted(inputs), target)
        optimizer.zero_grad()
        losses.mean_over_samples(losses.losses).sum().backward()
        optimizer.step()
    for name, found in module.state_dict().items():
        torch.testing.assert_close(found, wanted.state_dict()[name], msg=name)


def test_scalars_are_logged_and_the_loss_is_known() -> None:
    module, used = Exits(), callback()
    trainer = fit(module, used)
    names = {"train_loss", "meta_loss", "hypergradient_norm"}
    names |= {f"{name}/exit_{k}" for name in ("loss", "weight", "share") for k in (1, 2)}
    logged = trainer.callback_metrics
    assert {f"reweight/{name}" for name in names} <= set(logged)
    assert torch.equal(module.losses[-1], logged["reweight/train_loss"])
    assert len({loss.item() for loss in module.losses}) == NUM_STEPS


def test_the_module_gets_its_methods_back() -> None:
    module = Exits()
    own = module.training_step
    fit(module, callback())
    assert module.training_step == own
    assert "backward" not in vars(module)
    got = r"got .*2.* torch.float32 \[8, 6\] on cpu, torch.int64 \[8\] on cpu\."
    with pytest.raises(ValueError, match=rf"must be a pair \(train, meta\).*{got}.*CombinedLoader"):
        Trainer(max_steps=1, callbacks=[callback()], **QUIET).fit(module, loader().iterables[0])
    assert module.training_step == own
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx)  # on the object
    replaced = module.training_step
    fit(module, callback())
    assert module.training_step is replaced
    with pytest.raises(ValueError, match="`gradient_clip_algorithm`"):  # before it is taken over
        fit(module, callback(), gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert module.training_step is replaced


def test_a_state_is_loaded_once() -> None:
    """A later fit begins with a step of its own, as its optimizer is one."""
    used = callback()
    calls = []
    for load in (False, True, False):
        if load:
            used.load_state_dict(used.state_dict())
        fit(Exits(), used)
        calls.append(used.state_dict()["num_calls"])
    assert calls == [NUM_STEPS, 2 * NUM_STEPS, NUM_STEPS]


def test_lagged_needs_no_meta_batch() -> None:
    module, used = Exits(), callback(lagged=True)
    Trainer(max_steps=3, callbacks=[used], **QUIET).fit(module, loader().iterables[0])
    assert torch.isfinite(used._result.meta_loss)
    # Between two calls that accumulate, the step that the next batch would judge is not taken.
    with pytest.raises(ValueError, match="accumulate nothing"):
        fit(Exits(), used, accumulate_grad_batches=2, train=loader().iterables[0])


def test_what_cannot_work_says_so() -> None:
    with pytest.raises(ValueError, match="`gradient_clip_algorithm` must be 'norm'"):
        fit(Exits(), callback(), gradient_clip_val=0.1, gradient_clip_algorithm="value")
    manual = Exits()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="`automatic_optimization` must be True"):
        fit(manual, callback())
    with pytest.raises(TypeError, match="`scaler` must be left to the Trainer"):
        callback(scaler=None)
    with pytest.raises(TypeError, match=r"`reweighter` must be .*the class SampleReweighter"):
        MetaReweight(SampleReweighter)
    with pytest.raises(TypeError, match="'intervall'"):
        callback(intervall=10)


def test_the_reweighters_optimizer_can_be_given() -> None:
    reweighter = SampleReweighter(num_exits=2)
    optimizer = torch.optim.Adam(reweighter.parameters(), lr=1e-2)
    used = MetaReweight(reweighter, interval=2, reweighter_optimizer=optimizer)
    before = {name: value.clone() for name, value in reweighter.state_dict().items()}
    fit(Exits(), used)
    assert used.step.reweighter_optimizer is optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {NUM_STEPS // 2}
    assert not any(map(torch.equal, before.values(), reweighter.state_dict().values()))


class Joined(Exits):
    """Without BatchNorm, whose statistics DDP takes of each rank's own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Identity()
        self.double()

    def train_dataloader(self) -> CombinedLoader:
        """Rank r of n has every n-th sample: their batches joined are those of one process."""
        rank, num = self.trainer.global_rank, self.trainer.world_size
        sets = [samples(seed, NUM_STEPS * BATCH).tensors for seed in (1, 2)]
        parts = [TensorDataset(x[rank::num].double(), y[rank::num]) for x, y in sets]
        return CombinedLoader([DataLoader(part, BATCH // num) for part in parts], "min_size")


def train_on(devices: int) -> Joined:
    seed_everything(1, verbose=False)
    module = Joined()
    used = MetaReweight(SampleReweighter(num_exits=2).double())
    strategy = "ddp" if devices > 1 else "auto"
    options = {**QUIET, "devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    Trainer(max_steps=NUM_STEPS, callbacks=[used], **options).fit(module)
    return module


def save_on_a_rank(path: str) -> None:
    module = train_on(2)
    if module.global_rank == 0:
        torch.save(module.state_dict(), path)


def test_two_processes_are_one_on_the_joined_batches(tmp_path: Path) -> None:
    """To 1e-10 in float64: the sums are in another order."""
    script, path = tmp_path / "script.py", tmp_path / "state.pt"
    script.write_text(f"import {__name__} as t; t.save_on_a_rank({str(path)!r})")
    run_torchrun(tmp_path / "output", str(script), seconds=300)
    wanted = train_on(1).state_dict()
    for name, found in torch.load(path, weights_only=True).items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-10)


def test_the_example_trains_both_ways(capsys) -> None:
    lightning_exits.main(["--epochs", "4"])
    printed = capsys.readouterr().out
    conventional, reweighted = re.findall(r"(?:conventional|reweighted): .*", printed)
    assert conventional.split()[1:] != reweighted.split()[1:]
    for line in (conventional, reweighted):
        assert all(float(share) > 50 for share in re.findall(r"([\d.]+)%", line)), line
    assert printed.count("within a budget") == 6
    assert len(re.findall(r"reweight/weight/exit_\d [\d.]+", printed)) == 4
