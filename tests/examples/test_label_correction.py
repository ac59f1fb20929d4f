"""The example of label correction runs, and trusts right labels more than wrong ones."""

import torch
from torch.nn.functional import cross_entropy

import label_correction


def test_a_row_for_each_sample_and_exit_with_both_losses() -> None:
    outputs = [torch.randn(3, 5) for _ in range(2)]
    given, pseudo = torch.tensor([0, 1, 4]), torch.tensor([0, 2, 3])
    losses = label_correction.both_losses(outputs, (given, pseudo))
    assert losses.shape == (6, 2)
    for i in range(3):
        for k in range(2):
            for column, label in enumerate((given[i], pseudo[i])):
                expected = cross_entropy(outputs[k][i], label)
                torch.testing.assert_close(losses[2 * i + k, column], expected)


def test_right_labels_are_trusted_more_once_the_averaged_model_knows_better() -> None:
    accuracy, right, wrong = label_correction.train(0, 20, num_exits=1, corrected=True)
    assert accuracy > 90
    assert wrong.min() >= 0
    assert right.max() <= 2  # of both columns 1 in the mean
    assert right.mean() > 1.5 * wrong.mean()


def test_it_reports(capsys) -> None:
    label_correction.main(["--seeds", "1", "--epochs", "1", "--exits", "2"])
    assert "seed 0: weights alone" in capsys.readouterr().out
