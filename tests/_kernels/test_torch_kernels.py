"""The kernels for the CPU, block by block, against float64 and autograd."""

import pytest
import torch
import torch.nn.functional as F

from reweight import exit_cross_entropy
from reweight._kernels import torch_kernels


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_logits_is_the_prediction(dtype) -> None:
    logits = torch.randint(4, (500, 7)).to(dtype)
    target = torch.randint(7, (500,))
    result = exit_cross_entropy([logits, -logits], target)
    expected = torch.stack([z.argmax(1) == target for z in (logits, -logits)], 1)
    assert torch.equal(result.correct, expected)


@pytest.mark.usefixtures("sizes")
def test_layout_does_not_matter() -> None:
    wide = torch.randn(5, 14, dtype=torch.float64)
    exits = [wide[:, 1:6], wide.t()[2:12:2].t()[:, :5], torch.randn(5, 5, dtype=torch.float64).t()]
    exits = [z.requires_grad_() if z.is_leaf else z.detach().requires_grad_() for z in exits]
    target = torch.randint(5, (6,))[1:]
    result = exit_cross_entropy(exits, target)
    expected = torch.stack([F.cross_entropy(z, target, reduction="none") for z in exits], 1)
    torch.testing.assert_close(result.losses, expected)
    upstream = torch.randn(3, 5, dtype=torch.float64).t()
    ours, theirs = (torch.autograd.grad(y, exits, upstream) for y in (result.losses, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_rounded_once(dtype) -> None:
    """In a row of p_y = 0.999, p rounded to bfloat16 would be 1, and the gradient 0."""
    exits = [torch.randn(8, 6).to(dtype) for _ in range(2)]
    target = torch.randint(6, (8,))
    exits[0][0, target[0]] = 10
    upstream = torch.rand(8, 2)
    leaves = [z.clone().requires_grad_() for z in exits]
    gradients = torch.autograd.grad(exit_cross_entropy(leaves, target).losses, leaves, upstream)
    truths = [z.double().requires_grad_() for z in exits]
    losses = torch.stack([F.cross_entropy(z, target, reduction="none") for z in truths], 1)
    for ours, truth in zip(
        gradients, torch.autograd.grad(losses, truths, upstream.double()), strict=True
    ):
        assert ours.dtype == dtype
        # Half a unit in the last place, and what p − q, formed in float32, cannot resolve.
        torch.testing.assert_close(ours.double(), truth, rtol=torch.finfo(dtype).eps, atol=3e-7)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_backward_and_tangent_are_those_of_autograd(label_smoothing: float, dtype) -> None:
    """From the logits, from their exponentials, and in the memory of these."""
    logits = [torch.randn(9, num_classes).to(dtype) for num_classes in (3, 5)]
    target = torch.tensor([0, 2, 1, -100, 0, 1, 2, 2, -100])
    upstream, moved = torch.rand(2, 9).to(dtype), [torch.randn_like(z) for z in logits]
    rest = -100, label_smoothing
    losses, confidence, _, peak, kept = torch_kernels.forward(logits, target, *rest, keep=True)
    leaves = [z.double().requires_grad_() for z in logits]
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    usual = torch.stack([F.cross_entropy(z, target, **options) for z in leaves])
    close = (
        {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(losses.double(), usual.detach(), **close)
    slopes = torch.autograd.grad(usual, leaves, torch.ones_like(usual), retain_graph=True)
    products = torch.stack([(s * dz).sum(1) for s, dz in zip(slopes, moved, strict=True)])
    ours = torch_kernels.tangent(logits, target, *rest, peak, confidence, moved)
    torch.testing.assert_close(ours.double(), products, **close)
    expected = torch.autograd.grad(usual, leaves, upstream.double())
    for sources, peaks, in_place in (
        (logits, peak, False),
        (kept, None, False),
        (kept, None, True),
    ):
        gradients = torch_kernels.backward(
            sources, target, *rest, peaks, confidence, upstream, in_place
        )
        for gradient, source, wanted in zip(gradients, sources, expected, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, **close)
            assert (gradient.data_ptr() == source.data_ptr()) == in_place
            assert gradient[[3, 8]].eq(0).all(), "of targets that are ignored"


def test_exponentials_are_kept_only_where_they_are_asked_for() -> None:
    logits = [torch.randn(4, 3)]
    target = torch.tensor([0, 1, 2, 0])
    *_, peak, kept = torch_kernels.forward(logits, target, None, 0.0, keep=True)
    torch.testing.assert_close(kept[0], (logits[0] - peak[0].unsqueeze(1)).exp())
    assert torch_kernels.forward(logits, target, None, 0.0, keep=False)[-1] == []
