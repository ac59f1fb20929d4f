"""Plain operations against PyTorch's own cross-entropy, where they alone are taken; derivatives."""

import pytest
import torch
import torch.nn.functional as F

from cases import make_logits
from reweight import exit_cross_entropy
from reweight._kernels import composite


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.5, 2, 5, dtype=torch.float64)])
@pytest.mark.parametrize("form", ["list", "tokens", "stacked"])
def test_probabilities_may_be_the_target(form, class_weight, label_smoothing) -> None:
    logits, exits, target = make_logits(form)
    target = torch.randn(*target.shape, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    options = {"label_smoothing": label_smoothing}
    result = exit_cross_entropy(logits, target, class_weight=class_weight, **options)
    flat = target.reshape(-1, 5)
    expected = torch.stack(
        [
            F.cross_entropy(z.reshape(-1, 5), flat, class_weight, reduction="none", **options)
            for z in exits
        ],
        1,
    )
    torch.testing.assert_close(result.losses, expected, rtol=1e-13, atol=1e-13)
    predictions = torch.stack([z.reshape(-1, 5).argmax(1) for z in exits], 1)
    assert torch.equal(result.correct, predictions == flat.argmax(1, keepdim=True))
    assert result.valid.all()
    upstream = torch.randn_like(expected)
    inputs = [*exits, target]
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (result.losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_class_impossible_in_target_and_logits_costs_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    target = torch.tensor([[0.5, 0.5, 0.0]])
    expected = F.cross_entropy(logits[:, :2], target[:, :2], reduction="none")
    torch.testing.assert_close(exit_cross_entropy(logits, target).losses[:, 0], expected)


def test_a_class_weight_that_is_learned_has_a_gradient() -> None:
    """PyTorch's own gives none, and does not say so."""
    logits = torch.randn(6, 5, dtype=torch.float64)
    target = torch.randint(5, (6,))
    for label_smoothing in (0.0, 0.1):
        weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda w, e=label_smoothing: (
                exit_cross_entropy(logits, target, class_weight=w, label_smoothing=e).losses
            ),
            weight,
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("are_exponentials", [False, True])
def test_the_derivative_is_that_of_the_losses(label_smoothing: float, are_exponentials) -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 7, 1, 2])
    losses, _, _ = composite.forward([z], target, 7, label_smoothing)
    (expected,) = torch.autograd.grad(losses.sum(), z)
    rows = (z - torch.randn(5, 1).double()).exp() if are_exponentials else z
    options = {"are_exponentials": are_exponentials}
    found = composite.derivative(rows, target, 7, label_smoothing, **options)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(found[2], torch.zeros(4).double()), "the target is ignored"
    # And it can be differentiated itself: the second derivatives are PyTorch's.
    direction = torch.randn(5, 4, dtype=torch.float64)
    usual = F.cross_entropy(
        z, target, reduction="sum", ignore_index=7, label_smoothing=label_smoothing
    )
    (slope,) = torch.autograd.grad(usual, z, create_graph=True)
    ours, theirs = (torch.autograd.grad((s * direction).sum(), z)[0] for s in (found, slope))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_rows_that_do_not_count_take_no_value_and_no_gradient() -> None:
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    target = torch.tensor([0, 7])
    kept = composite.counted(rows * rows, target, 7)
    assert kept.tolist() == [[1.0, 4.0], [0.0, 0.0]]
    (gradient,) = torch.autograd.grad(composite.counted(rows, target, 7, rows.detach()).sum(), rows)
    assert gradient.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert composite.counted(rows, target, None) is rows
