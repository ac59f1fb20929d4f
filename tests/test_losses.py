"""exit_cross_entropy against PyTorch's own losses and softmax, exit by exit."""

import pytest
import torch
import torch.nn.functional as F

from reweight import exit_cross_entropy

FORMS = ["list", "stacked", "tokens", "stacked_tokens", "single", "single_tokens"]


def make(form: str, dtype=torch.float64):
    shape = (2, 3) if "tokens" in form else (6,)
    num_exits = 1 if "single" in form else 3
    exits = [torch.randn(*shape, 5, dtype=dtype, requires_grad=True) for _ in range(num_exits)]
    target = torch.randint(5, shape)
    if form == "single" or form == "single_tokens":
        return exits[0], exits, target
    return (torch.stack(exits) if "stacked" in form else exits), exits, target


@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.5, 2, 5, dtype=torch.float64)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_equals_cross_entropy_of_each_exit(form, label_smoothing, class_weight) -> None:
    logits, exits, target = make(form)
    target.view(-1)[1] = -100
    options = {"label_smoothing": label_smoothing, "weight": class_weight}
    result = exit_cross_entropy(
        logits, target, label_smoothing=label_smoothing, class_weight=class_weight
    )
    flat = [z.reshape(-1, 5) for z in exits]
    expected = torch.stack(
        [F.cross_entropy(z, target.view(-1), reduction="none", **options) for z in flat], 1
    )
    torch.testing.assert_close(result.losses, expected, rtol=1e-13, atol=1e-13)
    probabilities = torch.stack([z.softmax(1) for z in flat], 1)
    best, prediction = probabilities.max(2)
    torch.testing.assert_close(result.confidence, best, rtol=1e-13, atol=1e-13)
    assert torch.equal(result.correct, prediction == target.view(-1, 1))
    assert torch.equal(result.valid, target.view(-1) != -100)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, exits, upstream) for y in (result.losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not result.confidence.requires_grad


def test_plain_losses_and_gradients_are_bitwise_those_of_pytorch() -> None:
    _, exits, target = make("list", torch.float32)
    ours = exit_cross_entropy(exits, target).losses
    theirs = torch.stack([F.cross_entropy(z, target, reduction="none") for z in exits], 1)
    assert torch.equal(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), exits),
        torch.autograd.grad(theirs.sum(), exits),
        strict=True,
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_give_float32_losses(dtype) -> None:
    logits = torch.randn(4, 6).to(dtype)
    target = torch.randint(6, (4,))
    result = exit_cross_entropy(logits, target)
    assert result.losses.dtype == result.confidence.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(result.losses[:, 0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.5])
def test_label_smoothing_out_of_range_is_named(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"`label_smoothing` must lie in \[0, 1\]"):
        exit_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=label_smoothing)


def test_exits_may_differ_in_classes() -> None:
    result = exit_cross_entropy([torch.randn(4, 3), torch.randn(4, 9)], torch.tensor([0, 1, 2, 0]))
    assert result.losses.shape == (4, 2)


def test_shares_of_the_mean_leave_ignored_samples_out() -> None:
    result = exit_cross_entropy(torch.randn(4, 3), torch.tensor([0, 7, 2, 7]), ignore_index=7)
    assert result.sample_shares().flatten().tolist() == [0.5, 0.0, 0.5, 0.0]
    everything = exit_cross_entropy(torch.randn(2, 3), torch.tensor([7, 7]), ignore_index=7)
    assert everything.sample_shares().sum() == 0


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"`target` must lie in 0..2.*got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), ValueError, r"got -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 1]), ValueError, r"\[3, 'C'\], got \[2, 3\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ValueError, "at least one sample"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], torch.tensor([0, 1]), ValueError, "exit 1"),
        ([], torch.tensor([0, 1]), TypeError, "Pass `exits=`"),
        ({"logits": 1}, torch.tensor([0, 1]), TypeError, "got dict"),
        (torch.zeros(()), torch.tensor([0]), ValueError, "exit 0"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), TypeError, "int64 tensor, got a tensor of"),
        (torch.zeros(2, 3), [0, 1], TypeError, "got list"),
        (None, torch.tensor([0]), TypeError, "got NoneType"),
    ],
)
def test_bad_input_is_named(logits, target, error, message) -> None:
    with pytest.raises(error, match=message):
        exit_cross_entropy(logits, target)
