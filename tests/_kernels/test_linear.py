"""Cross-entropy behind a shared head against the head, then cross-entropy; by chunks."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.flop_counter import FlopCounterMode

from cases import make_logits
from reweight import exit_cross_entropy, linear_exit_cross_entropy
from reweight._kernels import linear


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["list", "stacked", "tokens"])
def test_linear_equals_logits_then_losses(form, label_smoothing, bias) -> None:
    hidden, exits, target = make_logits(form)
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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, ValueError, r"`weight` must have the shape \['V', 5\]"),
        ({"bias": torch.zeros(8)}, ValueError, r"`bias` must have the shape \[9\]"),
        ({"target": torch.full((6,), 9)}, ValueError, r"`target` must lie in 0..8"),
        ({"target": torch.rand(6, 9)}, TypeError, "class indices"),
        ({"hidden": torch.zeros(5, 5)}, ValueError, "`hidden` of exit 1"),
        ({"label_smoothing": 2.0}, ValueError, "`label_smoothing`"),
        ({"softcap": 0.0}, ValueError, "`softcap` must be positive"),
        ({"z_loss": "1"}, TypeError, "`z_loss` must be a number"),
        ({"class_weight": torch.ones(8)}, ValueError, r"`class_weight` must have the shape \[9\]"),
        (
            {"class_weight": torch.ones(9), "label_smoothing": 0.1},
            ValueError,
            "`label_smoothing` must be 0 beside `class_weight`",
        ),
    ],
)
def test_bad_input_of_the_linear_form_is_named(arguments, error, message) -> None:
    good = {"hidden": torch.zeros(6, 5), "weight": torch.zeros(9, 5), "target": torch.zeros(6)}
    good["target"] = good["target"].long()
    with pytest.raises(error, match=message):
        linear_exit_cross_entropy(**(good | arguments))


def capped(z: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return z if softcap is None else softcap * (z / softcap).tanh()


OPTIONS = [
    {"softcap": 2.0},
    {"z_loss": 0.3},
    {"z_loss": 0.3, "label_smoothing": 0.2},
    {"class_weight": True},
    {"class_weight": True, "softcap": 2.0, "z_loss": 0.3},
]


def linear_twin(
    exits, weight, bias, target, *, softcap=None, z_loss=0.0, class_weight=None, label_smoothing=0.0
) -> torch.Tensor:
    """The losses [B, K], written out."""
    columns = []
    for hidden in exits:
        z = capped(hidden.flatten(0, -2) @ weight.t() + bias, softcap)
        loss = torch.nn.functional.cross_entropy(
            z, target.flatten(), class_weight, reduction="none", label_smoothing=label_smoothing
        )
        counts = target.flatten() != -100
        columns.append(loss + torch.where(counts, z_loss * z.logsumexp(1).square(), 0))
    return torch.stack(columns, 1)


def linear_case(options, dtype):
    _, exits, target = make_logits("tokens")
    target.view(-1)[2] = -100
    exits = [each.detach().to(dtype).requires_grad_() for each in exits]
    head = torch.nn.Linear(5, 9, dtype=dtype)
    if "class_weight" in options:
        options = options | {"class_weight": torch.rand(9, dtype=dtype)}
    inputs = [*exits, head.weight, head.bias]

    def ours(*inputs):
        *exits, weight, bias = inputs
        return linear_exit_cross_entropy(exits, weight, target, bias, **options).losses

    def twin(*inputs):
        *exits, weight, bias = inputs
        return linear_twin(exits, weight, bias, target, **options)

    return ours, twin, inputs


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_caps_normalisers_and_class_weights_are_those_of_the_logits(options, dtype) -> None:
    """Values, gradients, tangents and the gradient of a gradient."""
    ours, twin, inputs = linear_case(options, dtype)
    tangents = tuple(torch.randn_like(each) for each in inputs)
    seen = []
    for function in (ours, twin):
        losses = function(*inputs)
        upstream = torch.linspace(-1, 1, losses.numel(), dtype=dtype).view_as(losses)
        plain = torch.autograd.grad(losses, inputs, upstream, retain_graph=True)
        graph = torch.autograd.grad(losses, inputs, upstream, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in graph), inputs)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, tangents)
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
        seen.append((losses, plain, graph, second, tangent))
    torch.testing.assert_close(*seen)


def test_under_transforms_and_compilers_they_are_the_same() -> None:
    ours, twin, inputs = linear_case(OPTIONS[-1], torch.float64)
    inputs = [each.detach() for each in inputs]
    jacobians = (torch.func.jacrev(f, tuple(range(len(inputs))))(*inputs) for f in (ours, twin))
    torch.testing.assert_close(*jacobians)
