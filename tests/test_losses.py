"""exit_cross_entropy against PyTorch's own losses and softmax, exit by exit."""

import pytest
import torch
import torch.nn.functional as F

from cases import make_logits
from properties import assert_same
from reweight import ExitLosses, exit_cross_entropy, linear_exit_cross_entropy

FORMS = ["list", "stacked", "tokens", "stacked_tokens", "single", "single_tokens"]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.5, 2, 5, dtype=torch.float64)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_equals_cross_entropy_of_each_exit(form, label_smoothing, class_weight) -> None:
    logits, exits, target = make_logits(form)
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


IMPLS = ["torch", "reference"]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_does_not_count_may_hold_anything(impl, dtype) -> None:
    exits = [torch.randn(4, 5).to(dtype) for _ in range(2)]
    for z in exits:
        z[1], z[2, 0] = torch.nan, torch.inf
        z.requires_grad_()
    target = torch.tensor([0, 3, 3, 4])
    target[1:3] = 2  # a class that is ignored
    result = exit_cross_entropy(exits, target, ignore_index=2, impl=impl)
    assert result.losses[1:3].eq(0).all()
    assert not result.correct[1:3].any()
    for order in (1, 2):
        gradients = torch.autograd.grad(
            result.losses.square().sum(), exits, retain_graph=True, create_graph=order == 2
        )
        for gradient in gradients:
            assert gradient[1:3].eq(0).all()
            assert gradient[0].ne(0).all()
    seconds = torch.autograd.grad(sum(g.square().sum() for g in gradients), exits)
    assert all(second[1:3].eq(0).all() and second.isfinite().all() for second in seconds)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_logits(impl) -> None:
    logits = torch.randn(4, 30)
    logits[0, :20] = logits[1, 3] = -torch.inf  # the second is a target
    target = torch.tensor([25, 3, 7, 0])
    leaf = logits.clone().requires_grad_()
    result = exit_cross_entropy([leaf, 2 * leaf], target, impl=impl)
    for k in range(2):
        expected = F.cross_entropy((k + 1) * logits, target, reduction="none")
        torch.testing.assert_close(result.losses[:, k], expected)
    assert result.losses[1].isinf().all()
    (gradient,) = torch.autograd.grad(result.losses[[0, 2, 3]].sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_lose_nothing(impl, label_smoothing) -> None:
    """log Σ exp z − z_y, as it is written, would be rounded to 1e-3 here."""
    logits = torch.randn(50, 10) + 1e4
    target = torch.randint(10, (50,))
    options = {"label_smoothing": label_smoothing}
    result = exit_cross_entropy(logits, target, impl=impl, **options)
    expected = F.cross_entropy(logits.double(), target, reduction="none", **options)
    torch.testing.assert_close(result.losses[:, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    exits = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    target = torch.randint(5, (6,))
    plain = exit_cross_entropy(exits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = exit_cross_entropy(exits, target)
    assert_same(cast, plain)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_an_ignored_class_is_never_correct(impl) -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    result = exit_cross_entropy(logits, torch.tensor([0, 1]), ignore_index=0, impl=impl)
    assert result.correct.tolist() == [[False], [True]]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "row", [[-torch.inf] * 3, [0.0, torch.nan, 1.0], [torch.inf, 0, torch.inf]]
)
def test_without_probabilities_there_is_no_prediction(row, impl) -> None:
    exits = [torch.tensor([row] * 3), torch.tensor([row] * 3)]
    result = exit_cross_entropy(exits, torch.arange(3), impl=impl)
    assert not result.correct.any()
    assert result.losses.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_smoothing_over_an_impossible_class_is_infinite_as_in_pytorch(impl) -> None:
    logits, options = torch.tensor([[0.0, 1.0, -torch.inf]] * 2), {"label_smoothing": 0.6}
    target = torch.tensor([2, 0])
    result = exit_cross_entropy(logits, target, impl=impl, **options)
    assert torch.equal(
        result.losses[:, 0], F.cross_entropy(logits, target, reduction="none", **options)
    )


def test_a_class_weight_that_is_not_used_does_not_matter() -> None:
    weight = torch.tensor([torch.inf, 1.0, 1.0])
    result = exit_cross_entropy(torch.randn(2, 3), torch.tensor([-100, 1]), class_weight=weight)
    assert result.losses.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_other_arguments_do_not_raise_the_dtype(impl) -> None:
    weight = torch.rand(3, dtype=torch.float64)
    result = exit_cross_entropy(
        torch.randn(2, 3), torch.tensor([0, 1]), class_weight=weight, impl=impl
    )
    assert result.losses.dtype == torch.float32
    soft = torch.rand(2, 3, dtype=torch.float64).softmax(1)
    assert exit_cross_entropy(torch.randn(2, 3), soft).losses.dtype == torch.float32


def test_shares_of_the_mean_leave_ignored_samples_out() -> None:
    result = exit_cross_entropy(torch.randn(4, 3), torch.tensor([0, 7, 2, 7]), ignore_index=7)
    assert result.sample_shares().flatten().tolist() == [0.5, 0.0, 0.5, 0.0]
    everything = exit_cross_entropy(torch.randn(2, 3), torch.tensor([7, 7]), ignore_index=7)
    assert everything.sample_shares().sum() == 0


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("num_weights", [1, 2])
def test_class_weights_of_another_number_are_named(impl: str, num_weights: int) -> None:
    weight, target = torch.ones(num_weights), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="`class_weight` must have one weight for each class"):
        exit_cross_entropy(torch.zeros(4, 3), target, class_weight=weight, impl=impl)


def test_labels_are_those_of_the_rows() -> None:
    target = torch.tensor([[0, 2], [-100, 1]])
    exits = [torch.randn(2, 2, 3)] * 2
    assert exit_cross_entropy(exits, target).labels.tolist() == [0, 2, -100, 1]
    hidden, head = [torch.randn(2, 2, 4)] * 2, torch.randn(3, 4)
    assert linear_exit_cross_entropy(hidden, head, target).labels.tolist() == [0, 2, -100, 1]
    soft = torch.rand(2, 2, 3).softmax(-1)
    assert torch.equal(exit_cross_entropy(exits, soft).labels, soft.view(4, 3))


def test_batches_are_joined_field_by_field() -> None:
    parts = [exit_cross_entropy(torch.randn(n, 3), torch.randint(3, (n,))) for n in (2, 3)]
    joined = ExitLosses.cat(parts)
    for name, values in joined._asdict().items():
        each = [getattr(part, name) for part in parts]
        assert values is None if each[0] is None else torch.equal(values, torch.cat(each)), name
    assert joined.labels is not None
    some = ExitLosses.cat([parts[0], ExitLosses(torch.rand(1, 1))])
    assert some.losses.shape == (3, 1)
    assert some.confidence is None


def test_probabilities_are_the_mean_softmax_of_the_exits() -> None:
    logits = [torch.randn(2, 3, 4) for _ in range(2)]
    target = torch.randint(4, (2, 3))
    found = exit_cross_entropy(logits, target, probabilities=True)
    expected = sum(z.softmax(-1) for z in logits) / 2
    torch.testing.assert_close(found.features, expected.view(6, 4))
    assert exit_cross_entropy(logits, target).features is None
    other = [logits[0], torch.randn(2, 3, 5)]
    with pytest.raises(ValueError, match="`probabilities` must be left out"):
        exit_cross_entropy(other, target, probabilities=True)
