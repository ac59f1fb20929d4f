"""exit_cross_entropy against PyTorch's own losses and softmax, exit by exit."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from reweight import exit_cross_entropy, linear_exit_cross_entropy
from reweight._kernels import function, linear, torch_kernels

INF = torch.inf
FORMS = ["list", "stacked", "tokens", "stacked_tokens", "single", "single_tokens"]


def make(form: str, dtype=torch.float64):
    shape = (2, 3) if "tokens" in form else (6,)
    num_exits = 1 if "single" in form else 3
    exits = [torch.randn(*shape, 5, dtype=dtype, requires_grad=True) for _ in range(num_exits)]
    target = torch.randint(5, shape)
    if form == "single" or form == "single_tokens":
        return exits[0], exits, target
    return (torch.stack(exits) if "stacked" in form else exits), exits, target


@pytest.fixture(params=["merged", "whole", "in blocks"])
def sizes(request, monkeypatch) -> None:
    """The ways that a size decides, on tensors that are small."""
    if request.param != "merged":
        monkeypatch.setattr(function, "_SMALL", 0)
        monkeypatch.setattr(torch_kernels, "_TINY", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(function, "_LARGE", 0)
        monkeypatch.setattr(torch_kernels, "_WHOLE", 0)
        monkeypatch.setattr(torch_kernels, "_BLOCK", 11)
        monkeypatch.setattr(linear, "_CHUNK", 7)


@pytest.mark.usefixtures("sizes")
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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.5, 2, 5, dtype=torch.float64)])
@pytest.mark.parametrize("form", ["list", "tokens", "stacked"])
def test_probabilities_may_be_the_target(form, class_weight, label_smoothing) -> None:
    logits, exits, target = make(form)
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
def test_logits_are_left_alone_and_may_be_used_again() -> None:
    base = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    logits = 2 * base
    before = logits.detach().clone()
    target = torch.randint(5, (6,))
    value = exit_cross_entropy([logits, logits], target).losses.sum()
    value = value + exit_cross_entropy(logits, target).losses.sum() + logits.softmax(1)[:, 0].sum()
    expected = 3 * F.cross_entropy(logits, target, reduction="sum") + logits.softmax(1)[:, 0].sum()
    ours, theirs = (torch.autograd.grad(y, base, retain_graph=True)[0] for y in (value, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits, before)


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


def test_autocast_changes_nothing() -> None:
    exits = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    target = torch.randint(5, (6,))
    plain = exit_cross_entropy(exits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = exit_cross_entropy(exits, target)
    for ours, theirs in zip(plain, cast, strict=True):
        assert torch.equal(ours, theirs)


def test_the_graph_does_not_hold_the_logits() -> None:
    """What the exponentials take the place of is free to go."""
    base = torch.randn(6, 5, requires_grad=True)
    logits = base + 1
    gone = weakref.ref(logits)
    losses = exit_cross_entropy([logits, base + 2], torch.randint(5, (6,))).losses
    del logits
    gc.collect()
    assert gone() is None
    losses.sum().backward()


def test_the_profiler_sees_it_by_name() -> None:
    logits = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        exit_cross_entropy(logits, torch.randint(5, (6,))).losses.sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"ExitCrossEntropy", "ExitCrossEntropyBackward"} <= names


def test_the_flop_counter_counts_the_products() -> None:
    """Two flops a multiply-add: one product forward, and in the backward it again and two more."""
    hidden = [torch.randn(10, 4, requires_grad=True) for _ in range(3)]
    head = torch.nn.Linear(4, 7)
    with FlopCounterMode(display=False) as counter:
        losses = linear_exit_cross_entropy(
            hidden, head.weight, torch.randint(7, (10,)), head.bias
        ).losses
    assert counter.get_total_flops() == 2 * 3 * 10 * 4 * 7
    with FlopCounterMode(display=False) as counter:
        losses.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 10 * 4 * 7


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["list", "stacked", "tokens"])
def test_linear_equals_logits_then_losses(form, label_smoothing, bias) -> None:
    hidden, exits, target = make(form)
    target.view(-1)[2] = -100
    head = torch.nn.Linear(5, 9, bias=bias, dtype=torch.float64)
    result = linear_exit_cross_entropy(
        hidden, head.weight, target, head.bias, label_smoothing=label_smoothing
    )
    logits = [head(h) for h in exits]
    expected = exit_cross_entropy(logits, target, label_smoothing=label_smoothing, impl="reference")
    torch.testing.assert_close(result[:2], expected[:2])
    assert torch.equal(result.correct, expected.correct)
    assert torch.equal(result.valid, expected.valid)
    upstream = torch.randn_like(expected.losses)
    inputs = [*exits, *head.parameters()]
    ours, theirs = (torch.autograd.grad(y.losses, inputs, upstream) for y in (result, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_linear_computes_no_gradient_that_nobody_asked_for(frozen) -> None:
    hidden = torch.randn(6, 5, requires_grad=frozen != "hidden")
    weight = torch.randn(9, 5, requires_grad=frozen != "weight")
    losses = linear_exit_cross_entropy(hidden, weight, torch.randint(9, (6,))).losses
    with FlopCounterMode(display=False) as counter:
        losses.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 9  # the logits again, and one product


def test_linear_adds_the_gradient_of_the_head_up_in_float32(monkeypatch) -> None:
    """Many small terms added to a large sum in bfloat16 would vanish."""
    monkeypatch.setattr(linear, "_CHUNK", 1)
    hidden = torch.ones(600, 4, dtype=torch.bfloat16)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    losses = linear_exit_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.int64)).losses
    losses.sum().backward()
    assert weight.grad[0].eq(-300).all()  # 600 times p − 1 = −½; in bfloat16 it stops at −128


def test_linear_under_autocast_is_linear_under_autocast() -> None:
    hidden = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    head = torch.nn.Linear(5, 9)
    target = torch.randint(9, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_exit_cross_entropy(hidden, head.weight, target, head.bias).losses
        theirs = exit_cross_entropy([head(h) for h in hidden], target).losses
    inputs = [*hidden, *head.parameters()]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    # The same products in bfloat16, but the gradient of the head is rounded at other places.
    for mine, other in zip(
        *(torch.autograd.grad(losses.sum(), inputs) for losses in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, ValueError, r"`weight` must have the shape \['V', 5\]"),
        ({"bias": torch.zeros(8)}, ValueError, r"`bias` must have the shape \[9\]"),
        ({"target": torch.full((6,), 9)}, ValueError, r"`target` must lie in 0..8"),
        ({"target": torch.rand(6, 9)}, TypeError, "class indices"),
        ({"hidden": torch.zeros(5, 5)}, ValueError, "`hidden` of exit 0"),
        ({"label_smoothing": 2.0}, ValueError, "`label_smoothing`"),
    ],
)
def test_bad_input_of_the_linear_form_is_named(arguments, error, message) -> None:
    good = {"hidden": torch.zeros(6, 5), "weight": torch.zeros(9, 5), "target": torch.zeros(6)}
    good["target"] = good["target"].long()
    with pytest.raises(error, match=message):
        linear_exit_cross_entropy(**(good | arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "`impl` must be one of"),
        ({"impl": "torch", "target": torch.rand(4, 3)}, "'auto' or 'reference'"),
        (
            {"impl": "triton", "label_smoothing": 0.1, "class_weight": torch.ones(3)},
            "'auto' or 'reference'",
        ),
        ({"impl": "triton", "logits": torch.zeros(4, 3).double()}, "one dtype"),
        ({"impl": "triton"}, "on one GPU"),
        ({"class_weight": torch.ones(2)}, "`class_weight` must have one weight for each class"),
        ({"class_weight": torch.ones(1), "impl": "reference"}, "`class_weight` must have one"),
    ],
)
def test_implementations_say_what_they_cannot_do(options, message) -> None:
    arguments = {"logits": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        exit_cross_entropy(**(arguments | options))


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
    soft = torch.rand(2, 3, dtype=torch.float64)
    assert exit_cross_entropy(torch.randn(2, 3), soft).losses.dtype == torch.float32


def test_the_exponentials_become_the_gradient(monkeypatch) -> None:
    """Unless the graph is kept, or a gradient has a graph that needs them."""
    seen = []
    backward = function.kernel_backward

    def spy(*arguments):
        seen.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(function, "kernel_backward", spy)
    leaf = torch.randn(4, 3, requires_grad=True)
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0])).losses.sum()
    losses.backward(retain_graph=True)
    losses.backward()
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0])).losses.sum()
    torch.autograd.grad(losses, leaf, create_graph=True)
    losses.backward()
    assert seen == [False, True, False]


def test_a_backward_that_broke_off_does_not_run_again(monkeypatch) -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0])).losses.sum()
    backward = function.kernel_backward

    def broken(*arguments):
        backward(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(function, "kernel_backward", broken)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        pytest.raises(KeyboardInterrupt),
    ):
        losses.backward()
    with pytest.raises(RuntimeError, match=r"broke off|second time|inplace"):
        losses.backward()


@pytest.mark.usefixtures("sizes")
def test_results_may_be_changed_in_place() -> None:
    leaves = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    result = exit_cross_entropy(leaves, torch.tensor([0, 1, 2, 0]))
    result.confidence.clamp_(max=0.5)
    losses = 1 * result.losses
    losses[0] = 0
    losses.sum().backward()
    assert all(z.grad[0].eq(0).all() and z.grad[1].ne(0).all() for z in leaves)


def test_exits_that_are_frozen_keep_nothing() -> None:
    exits = [torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)]
    with torch.autograd.graph.saved_tensors_hooks(sizes := Sizes(), lambda x: x):
        losses = exit_cross_entropy(exits, torch.tensor([0, 1, 2, 0])).losses
    assert sizes.count([4, 3]) == 1
    losses.sum().backward()


class Sizes(list):
    """Takes note of what a graph saves."""

    def __call__(self, tensor):
        self.append(list(tensor.shape))
        return tensor


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
        ({"logits": 1}, torch.tensor([0, 1]), TypeError, r"got a dict\(logits=int\)"),
        (torch.zeros(()), torch.tensor([0]), ValueError, "exit 0"),
        (
            torch.zeros(2, 3),
            torch.tensor([0.0, 1.0]),
            TypeError,
            r"int64 tensor, or .* got a tensor of",
        ),
        (torch.zeros(2, 3), [0, 1], TypeError, "got list"),
        (None, torch.tensor([0]), TypeError, "got NoneType"),
        (torch.zeros(0, 4, 3), torch.zeros(4).long(), ValueError, r"\[4, 'C'\], got \[0, 4, 3\]"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), TypeError, "floating point"),
    ],
)
def test_bad_input_is_named(logits, target, error, message) -> None:
    with pytest.raises(error, match=message):
        exit_cross_entropy(logits, target)
