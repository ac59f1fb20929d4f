"""Fused kernels of attention run where they may, and nowhere is another mask drawn than before."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cases import MultiExit
from properties import outcome
from reweight._passes.attention import (
    PlainDropout,
    attention_layer,
    in_plain_operations,
    plain_attention,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MASK = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(1)
MASK[1, 0, 2] = False  # which may look nowhere
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": MASK},
    "with a bias": {"attn_mask": torch.linspace(-2, 2, 20).view(1, 4, 1, 5).repeat(1, 1, 5, 1)},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "grouped, masked and scaled": {"enable_gqa": True, "attn_mask": MASK, "scale": 0.3},
}


class Attention(nn.Module):
    """Of four heads; with grouped queries two of keys and values."""

    def __init__(self, grouped: bool, **how) -> None:
        super().__init__()
        self.how = how
        self.heads = 4, *(2 * [2] if grouped else 2 * [4])
        self.project = nn.Linear(6, 8 * sum(self.heads))

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).split([8 * n for n in self.heads], -1)
        q, k, v = (
            each.unflatten(-1, (n, 8)).transpose(1, 2)
            for each, n in zip(split, self.heads, strict=True)
        )
        how = {
            name: value.to(q.dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.how.items()
        }
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2)


def of(layer: nn.Module, width: int, dtype: torch.dtype) -> tuple:
    model = MultiExit([nn.Sequential(nn.Linear(6, 6), layer)], [nn.Linear(width, 4)])
    batches = [
        (torch.randn(2, 5, 6, dtype=dtype), torch.randint(4, (2, 5)).flatten()) for _ in range(2)
    ]
    return Flat(model).to(dtype), *batches


class Flat(nn.Module):
    """A row for each token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        return [logits.flatten(0, 1) for logits in self.inner(x)]


class Fused(TorchDispatchMode):
    """Counts how often fused attention runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if "flash" in name:
            self.backward += "backward" in name
            self.forward += "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_passes_without_tangents_are_fused(name: str, dtype, lean: bool, all_is_large) -> None:
    """And so are the values of the pass with tangents. bfloat16 is autocast's."""
    low = dtype is torch.bfloat16
    autocast = torch.autocast("cpu", dtype) if low else nullcontext()
    layer = Attention("grouped" in name, **CALLS[name])
    model, train, meta = of(layer, 32, torch.float32 if low else dtype)
    with autocast, Fused() as plain:
        model(train[0])[0].sum().backward()
    assert plain.forward == plain.backward
    assert plain.forward or "grouped" in name  # which PyTorch 2.6 does not fuse on the CPU
    model.zero_grad()
    with autocast, Fused() as fused:
        outcome(model, train, meta, lean=lean)
    # Warm-up, train and meta batch; a lean step runs the train batch again, and knows no values.
    assert fused.forward == (1 + 2 + 2 * lean) * plain.forward
    assert fused.backward == 3 * plain.backward  # the step ahead, the meta loss, and the step


class Chosen(Attention):
    """Chooses its kernel itself."""

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x)


@pytest.mark.parametrize("inside", [False, True])
def test_what_the_model_or_its_user_rules_out_never_runs(inside: bool) -> None:
    """A lean step computes the values of attention anew."""
    model, train, meta = of((Chosen if inside else Attention)(False), 32, torch.float32)
    with nullcontext() if inside else sdpa_kernel(SDPBackend.MATH), Fused() as fused:
        outcome(model, train, meta, lean=True)
    assert fused.forward == 0


class OwnMasks(TorchFunctionMode):
    """Plays a device whose fused kernels have dropout, and draw its mask in a way of their own."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_layer(*args, **kwargs)
        fused = torch.backends.cuda.flash_sdp_enabled()
        if func is not F.scaled_dot_product_attention or not fused:
            return func(*args, **kwargs)
        self.calls += 1
        with torch.random.fork_rng():
            torch.rand(())
            result = in_plain_operations(*args, **kwargs)
        in_plain_operations(*args, **kwargs)  # which draws as much
        return result


class Dropped(nn.Module):
    """PyTorch's own layer, which has dropout in its attention and elsewhere."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.4, batch_first=True)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.layer, x, use_reentrant=False)
        return self.layer(x)


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """Models are taken for ones on a GPU."""
    on = PlainDropout.on
    monkeypatch.setattr(PlainDropout, "on", lambda devices: on([GPU]))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_all_passes_draw_the_same_mask(lean: bool, checkpointed: bool, elsewhere) -> None:
    model, train, meta = of(Dropped(checkpointed), 6, torch.float64)
    expected = outcome(model, train, meta, estimator="unrolled")
    with OwnMasks() as device:
        found = outcome(model, train, meta, lean=lean)
    assert device.calls == 1  # the warm-up, which is no pass
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # rounding


def test_a_mask_of_the_devices_own_would_be_seen() -> None:
    """The test above fails without the means that it is a test of."""
    model, train, meta = of(Dropped(False), 6, torch.float64)
    with OwnMasks() as device, pytest.warns(UserWarning, match="do not agree"):
        outcome(model, train, meta)
    assert device.calls > 1


def test_no_other_attention_leaves_its_kernel(all_is_large) -> None:
    model, train, meta = of(Attention(False), 32, torch.float64)
    with PlainDropout.on([GPU]), Fused() as fused:
        outcome(model, train, meta)
    assert fused.forward == 3


def test_the_cpu_needs_nothing() -> None:
    assert not isinstance(PlainDropout.on([CPU]), PlainDropout)
    assert isinstance(PlainDropout.on([CPU, GPU]), PlainDropout)


def test_plain_attention_is_left_as_it_was_found() -> None:
    flash = torch.backends.cuda.flash_sdp_enabled
    before = flash(), torch.backends.mha.get_fastpath_enabled()
    with plain_attention():
        assert not flash()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert (flash(), torch.backends.mha.get_fastpath_enabled()) == before
