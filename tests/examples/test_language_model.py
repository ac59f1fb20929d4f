"""The language model example: what its arms are, what it measures, what it writes."""

import argparse
import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import language_model
from reweight import SampleReweighter

ROWS = torch.randint(language_model.VOCABULARY, (12, language_model.LENGTH + 1))


def trained(arm: str, monkeypatch, **changed) -> list[Tensor]:
    """Parameters after an epoch of three batches."""
    options = {"seed": 0, "epochs": 1, "batch_size": 4, "lr": 1e-3, "reweighter_lr": 1e-3}
    settings = argparse.Namespace(**options, interval=2)
    torch.manual_seed(0)
    model = language_model.make_model().train()
    steps, logged = [], []
    for name, value in changed.items():
        monkeypatch.setattr(language_model, name, value)
    language_model.train(
        model,
        ROWS,
        arm,
        settings,
        lambda scalars, step: logged.append(scalars),
        lambda: steps.append(1),
    )
    assert len(steps) == 6, "two halves of three batches"
    assert set(logged[0]) >= {"loss/exit_1", "loss/exit_2", "loss/exit_3"}
    return [parameter.detach() for parameter in model.parameters()]


def test_weights_of_one_are_conventional_training(monkeypatch) -> None:
    plain = trained("conventional", monkeypatch)
    ones = partial(SampleReweighter, strength=0.0)
    # Bitwise the same gradients: what is left is that of sums in another order.
    torch.testing.assert_close(
        trained("reweighted", monkeypatch, SampleReweighter=ones), plain, rtol=0, atol=1e-4
    )


def test_learned_and_fixed_weights_train_otherwise(monkeypatch) -> None:
    plain = trained("conventional", monkeypatch)
    for arm in ("reweighted", "LayerSkip"):
        assert not all(map(torch.equal, trained(arm, monkeypatch), plain))


def test_the_fixed_weights_are_those_of_the_publication() -> None:
    # e(1) = 0 + 1, e(3) = 0 + ... + 3, and for the last layer e(5) = 5 + (0 + ... + 4)
    expected = torch.tensor([1.0, 6.0, 15.0]) * 3 / 22
    torch.testing.assert_close(language_model.layerskip_weights(), expected)


def test_every_exit_is_judged_on_every_token() -> None:
    model = language_model.make_model().eval()
    losses = language_model.evaluate(model, ROWS)
    with torch.no_grad():
        for k, hidden in enumerate(model(ROWS[:, :-1])):
            logits = F.linear(hidden, language_model.head_of(model)).flatten(0, 1)
            expected = F.cross_entropy(logits, ROWS[:, 1:].flatten(), reduction="none")
            torch.testing.assert_close(losses.losses[:, k], expected)


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_a_run_writes_a_row_for_each_arm(logger: str, tmp_path, monkeypatch, capsys) -> None:
    if logger != "none":
        pytest.importorskip(logger)
    some = list(language_model.topics.values())[:40]
    monkeypatch.setattr(language_model, "load_texts", lambda: some)
    arguments = ["--epochs", "1", "--batch-size", "8", "--max-rows", "8", "--interval", "1"]
    language_model.main([*arguments, "--logger", logger, "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == list(language_model.ARMS)
    assert all(float(value) >= 0 for row in rows for value in list(row.values())[1:])
    assert "perplexity 3" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/events*"))) == (3 if logger == "tensorboard" else 0)
