"""The example of noisy labels runs, and its weights tell right labels from wrong ones."""

import noisy_labels


def test_it_trains_reports_and_draws(tmp_path, capsys) -> None:
    picture = tmp_path / "weights.png"
    noisy_labels.main(["--seeds", "1", "--epochs", "2", "--out", str(picture)])
    assert "seed 0: plain" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


def test_wrong_labels_weigh_less_after_a_few_epochs() -> None:
    _, losses, weights, wrong = noisy_labels.train(seed=0, epochs=5, learned=True)
    assert losses.shape == weights.shape == (1197, 1)
    assert weights[wrong].mean() < 0.7 < 1.2 < weights[~wrong].mean()
