"""The forward-mode pass: its rules are PyTorch's own, and gradients within it have tangents."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import MultiExit
from model_rows import ROWS, set_up
from properties import outcome
from reweight._passes import forward_mode


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm", "nn.TransformerEncoderLayer, fused"])
@pytest.mark.parametrize("autocast", [False, True])
def test_models_get_the_rules(name: str, autocast: bool, monkeypatch) -> None:
    found: list[bool] = []

    def observed(rule):
        def run(*args, **kwargs):
            result = rule(*args, **kwargs)
            found.append(result is not None)
            return result

        return run

    for func in (F.batch_norm, F.layer_norm, F.scaled_dot_product_attention, F.linear):
        monkeypatch.setitem(forward_mode.FAST_RULES, func, observed(forward_mode.FAST_RULES[func]))
    model, _, train, meta = set_up(ROWS[name], torch.float32 if autocast else torch.float64)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        outcome(model, train, meta)
    assert found
    assert all(found)


def test_nothing_of_a_pass_waits_for_the_garbage_collector(recalled, monkeypatch) -> None:
    """It holds values of the first forward."""
    modes = []
    enter = forward_mode._ForwardMode.__enter__
    monkeypatch.setattr(
        forward_mode._ForwardMode,
        "__enter__",
        lambda self: (modes.append(weakref.ref(self)), enter(self))[1],
    )
    model, _, train, meta = set_up(ROWS["nn.TransformerEncoderLayer, fused"])
    gc.disable()
    try:
        outcome(model, train, meta)
        assert recalled
        assert [mode() for mode in modes] == [None] * len(modes)
    finally:
        gc.enable()


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
