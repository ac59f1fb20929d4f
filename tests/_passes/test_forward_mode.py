"""The forward-mode pass: its rules are PyTorch's own, and gradients within it have tangents."""

from itertools import product

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from cases import MultiExit
from properties import outcome
from reweight._passes import forward_mode
from reweight._passes.forward_mode import tangents_follow_gradients
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import PrimalCache
from test_models import ROWS, set_up


def attention(causal: bool):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


IMAGE, HEADS = (3, 4, 5, 5), (2, 3, 4, 6)
RULES = {
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear, one output": (lambda x, w, b: F.linear(x, w) + b, [(2, 3, 4), (4,), (2, 3)]),
    "conv1d": (torch.conv1d, [(2, 4, 6), (5, 4, 3), (5,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, groups=2), [IMAGE, (6, 2, 3, 3), (6,)]),
    "conv_transpose2d": (F.conv_transpose2d, [IMAGE, (4, 2, 3, 3), (2,)]),
    "batch_norm": (batch_norm, [IMAGE, (4,), (4,)]),
    "layer_norm": (layer_norm, [(2, 3, 4, 6), (4, 6), (4, 6)]),
    "attention": (attention(False), [HEADS, HEADS, HEADS]),
    "causal attention": (attention(True), [HEADS, (2, 3, 5, 6), (2, 3, 5, 2)]),
}


@pytest.mark.parametrize("moving", list(product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_forward_mode(name: str, moving: tuple[bool, ...]) -> None:
    func, shapes = RULES[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tangents = [torch.randn_like(tensor) for tensor in tensors]

    def run() -> tuple[Tensor, Tensor]:
        duals = [
            forward_ad.make_dual(t, d) if moves else t
            for t, d, moves in zip(tensors, tangents, moving, strict=True)
        ]
        return forward_ad.unpack_dual(func(*duals))

    with forward_ad.dual_level():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            theirs = run()
        with tangents_follow_gradients(PrimalCache(), Ladder()):
            ours = run()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # rounding


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm", "nn.TransformerEncoderLayer, fused"])
def test_models_get_the_rules(name: str, monkeypatch) -> None:
    found: list[bool] = []

    def observed(rule):
        def run(*args, **kwargs):
            result = rule(*args, **kwargs)
            found.append(result is not None)
            return result

        return run

    for func in (F.batch_norm, F.layer_norm, F.scaled_dot_product_attention, F.linear):
        monkeypatch.setitem(forward_mode.FAST_RULES, func, observed(forward_mode.FAST_RULES[func]))
    model, _, train, meta = set_up(ROWS[name])
    outcome(model, train, meta)
    assert found
    assert all(found)


class InnerGradient(nn.Module):
    """Takes a gradient in its forward, as energy models and gradient penalties do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        energy = self.inner(x).tanh().pow(2).sum()
        return [self.head(torch.autograd.grad(energy, x, create_graph=True)[0].mean(1))]


class OwnAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "layer",
    [nn.Identity, lambda: nn.LayerNorm(6), lambda: nn.BatchNorm1d(4), OwnAttention],
    ids=["linear", "LayerNorm", "BatchNorm", "attention"],
)
def test_gradients_within_the_forward_have_tangents(layer, recalled) -> None:
    torch.manual_seed(0)
    model = InnerGradient(nn.Sequential(nn.Linear(6, 6), layer())).double()
    train, meta = (
        (torch.randn(8, 4, 6, dtype=torch.float64), torch.randint(4, (8,))) for _ in range(2)
    )
    found, expected = (
        outcome(model, train, meta, estimator=estimator) for estimator in ("forward", "unrolled")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_two_precisions(dtype, recalled) -> None:
    """As autocast makes them: the input is in low precision, the weight is not."""
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6)
    model = MultiExit([nn.Sequential(nn.Linear(6, 6), *norms)], [nn.Linear(6, 4)])
    train, meta = ((torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(2))
    with torch.autocast("cpu", dtype):
        found, expected = (
            outcome(model, train, meta, estimator=estimator)
            for estimator in ("forward", "unrolled")
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)  # of 8 bits
