"""Each rule is the transpose of the operation's backward: ⟨u, ẏ⟩ = ⟨backward(u), ẋ⟩."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional as F

from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.tangent_rules import RULES

load_forward_mode()

TOKENS = torch.tensor([[0, 1, 1, 3], [4, 0, 1, 1], [2, 2, 0, 4]])
ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)
LSTM = torch.nn.LSTM(4, 8, 2, bidirectional=True)


def lstm(x: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return torch.lstm(x, (state, state), weights, True, 2, 0.0, True, True, False)


CALLS = {
    "embedding, padding": (lambda w: F.embedding(TOKENS, w, padding_idx=1), [(5, 3)]),
    "embedding, padding from the end": (lambda w: F.embedding(TOKENS, w, padding_idx=-1), [(5, 3)]),
    "embedding, by frequency": (
        lambda w: F.embedding(TOKENS, w, padding_idx=0, scale_grad_by_freq=True),
        [(5, 3)],
    ),
    "embedding_bag, mean": (lambda w: F.embedding_bag(TOKENS, w, padding_idx=1), [(5, 3)]),
    "embedding_bag, offsets": (
        lambda w: F.embedding_bag(TOKENS.flatten(), w, torch.tensor([0, 5, 5]), mode="sum"),
        [(5, 3)],
    ),
    "embedding_bag, weighted": (
        lambda w, s: F.embedding_bag(TOKENS, w, per_sample_weights=s, mode="sum"),
        [(5, 3), (3, 4)],
    ),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), [(5, 3), (5, 1)]),
    "weight_norm, last dimension": (lambda v, g: torch._weight_norm(v, g, 1), [(5, 3), (1, 3)]),
    "lstm": (lstm, [(6, 2, 4), (4, 2, 8), *(tuple(w.shape) for w in LSTM._flat_weights)]),
}
if hasattr(F, "grouped_mm"):
    CALLS["grouped_mm"] = (lambda a, b: F.grouped_mm(a, b, offs=ENDS), [(7, 8), (3, 8, 4)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_a_rule_is_the_transpose_of_the_backward(name: str, dtype: torch.dtype) -> None:
    if name == "grouped_mm" and dtype == torch.float64:
        pytest.skip("PyTorch has it in lower precision alone")
    torch.manual_seed(0)
    func, shapes = CALLS[name]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    leaves = [value.clone().requires_grad_() for value in values]
    with forward_ad.dual_level():
        tangents = [torch.randn_like(value) for value in values]
        duals = list(map(forward_ad.make_dual, values, tangents))
        ladder = Ladder()
        with tangents_follow_gradients(PrimalCache(), ladder):
            result = func(*duals)
        outputs = result if isinstance(result, tuple) else (result,)
        found = [forward_ad.unpack_dual(output) for output in outputs]
    assert not ladder.ways, "by its rule"
    expected = func(*leaves)
    expected = expected if isinstance(expected, tuple) else (expected,)
    upstream = [torch.randn_like(output) for output in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    forward = sum((u * each.tangent).sum() for u, each in zip(upstream, found, strict=True))
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    scale = sum((g * t).abs().sum() for g, t in zip(gradients, tangents, strict=True))
    assert (forward - backward).abs() < 20 * torch.finfo(dtype).eps * scale
    for each, output in zip(found, expected, strict=True):
        assert torch.equal(each.primal, output), "bitwise the value of the first forward"


def test_every_rule_is_tested() -> None:
    names = {getattr(func, "__name__", "").strip("_") for func in RULES}
    assert all(any(call.startswith(name) for call in CALLS) for name in names)
