"""Rules give the tangents of PyTorch's own forward mode, for every choice of what moves."""

from itertools import product

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reweight._passes.attention import plain_attention
from reweight._passes.forward_mode import load_forward_mode, tangents_follow_gradients
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import PrimalCache

load_forward_mode()
pytestmark = pytest.mark.usefixtures("all_is_large")


def attention(causal: bool):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def dropped(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(x, 0.3)


MASK = torch.ones(2, 1, 4, 5, dtype=torch.bool).tril(1)
MASK[1, 0, 2] = False  # which may look nowhere
BIAS = torch.arange(-7.0, 8).div(4).view(3, 1, 5)  # which low precision holds
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
    "masked attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK),
        [HEADS, (2, 3, 5, 6), (2, 3, 5, 2)],
    ),
    "attention with a bias": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS.to(q.dtype), scale=0.3),
        [HEADS, (2, 3, 5, 6), (2, 3, 5, 2)],
    ),
    "grouped queries": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(2, 6, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2)],
    ),
    "grouped queries, masked and scaled": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, scale=0.3, enable_gqa=True),
        [(2, 6, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2)],
    ),
    "grouped causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        [(2, 6, 4, 6), (2, 3, 4, 6), (2, 3, 4, 6)],
    ),
    "add": (lambda a, b, c: torch.add(a, b, alpha=2) - c, [HEADS, (4, 6), HEADS]),
    "mul": (lambda a, b, c: a * b * c, [HEADS, (4, 6), (3, 1, 6)]),
    "constants": (
        lambda a, b, c: (
            2 / (1 + 3 * a.exp())
            - torch.sub(b, torch.ones(6, dtype=b.dtype), alpha=0.5) / torch.full((4, 1), 4)
            + c.multiply(torch.ones(4, 6, dtype=torch.bool)).subtract(1)
        ),
        [HEADS, HEADS, HEADS],
    ),
    "dropout": (lambda a, b, c: dropped(a) * b + dropped(c), [HEADS, HEADS, HEADS]),
    "div": (lambda a, b, c: a / 3 + b / c, [HEADS, HEADS, HEADS]),
    "matmul": (lambda a, b, c: a @ b @ c, [(2, 4, 6), (2, 6, 3), (2, 3, 5)]),
    "entries": (
        lambda a, b, c: (
            F.gelu(a).relu() + b.tanh().sigmoid() + F.gelu(F.silu(c), approximate="tanh")
        ),
        [HEADS, HEADS, HEADS],
    ),
    "softmax": (lambda a, b, c: (a.softmax(-1) * b).softmax(1) + c, [HEADS, HEADS, HEADS]),
    "linear in all": (
        lambda a, b, c: (
            torch.cat([a.transpose(1, 2).flatten(1), b.flatten(1)], 1).mean(1) + c.sum((1, 2, 3))
        ),
        [HEADS, HEADS, HEADS],
    ),
    "pooling": (
        lambda a, b, c: F.adaptive_avg_pool2d(F.avg_pool2d(a, 2), 1) * b + c,
        [IMAGE, (4, 1, 1), (3, 4, 1, 1)],
    ),
}


ATTENTION = [name for name in RULES if "attention" in name or "grouped" in name]


class EveryResult(TorchDispatchMode):
    """Keeps all alive."""

    def __init__(self, kept: list) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}  # rounding, of sums of some dozen terms


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("moving", list(product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("known", [False, True])
def test_rules_are_forward_mode(
    name: str, moving: tuple[bool, ...], dtype: torch.dtype, known: bool
) -> None:
    func, shapes = RULES[name]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tangents = [torch.randn_like(tensor) for tensor in tensors]

    def run() -> tuple[Tensor, Tensor]:
        duals = [
            forward_ad.make_dual(t, d) if moves else t
            for t, d, moves in zip(tensors, tangents, moving, strict=True)
        ]
        return forward_ad.unpack_dual(func(*duals))

    with forward_ad.dual_level():
        with plain_attention():
            theirs = run()
        cache, kept = PrimalCache(), []
        if known:
            with cache, EveryResult(kept):
                func(*tensors)
        with tangents_follow_gradients(cache, Ladder()):
            ours = run()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class Names(TorchDispatchMode):
    """Of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["constants", "dropout", "linear", "layer_norm"])
@pytest.mark.parametrize("moving", [(True, False, False), (True, True, True)])
def test_constants_need_no_tensor_of_zeros(name: str, moving: tuple[bool, ...]) -> None:
    """Of which PyTorch computes the shape in Python, half a millisecond for each operation."""
    func, shapes = RULES[name]
    values = [torch.randn(shape) for shape in shapes]
    with forward_ad.dual_level(), tangents_follow_gradients(PrimalCache(), Ladder()):
        duals = [
            forward_ad.make_dual(v, torch.ones_like(v)) if moves else v
            for v, moves in zip(values, moving, strict=True)
        ]
        with Names() as seen:
            func(*duals)
    assert "aten::_efficientzerotensor" not in seen.names


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_under_autocast_is_rounded_once(name: str, low, given, known: bool) -> None:
    """Its value is that of the same call outside, and its tangent no worse than PyTorch's own."""
    func, shapes = RULES[name]
    tensors = [torch.randn(shape).to(low).to(given) for shape in shapes]
    directions = [torch.randn(shape).to(low).to(given) for shape in shapes]
    under_autocast(func, tensors, directions, low, known)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("moving", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_layer_norm_under_autocast_is_rounded_once(low, given, moving, known: bool) -> None:
    """The input is in low precision, as of a linear layer, and the weights are not."""
    func, shapes = RULES["layer_norm"]
    dtypes = given, torch.float32, torch.float32
    tensors = [torch.randn(s).to(dtype) for s, dtype in zip(shapes, dtypes, strict=True)]
    directions = [
        torch.randn_like(tensor) if moves else None
        for tensor, moves in zip(tensors, moving, strict=True)
    ]
    under_autocast(func, tensors, directions, low, known)


def under_autocast(
    func, tensors: list[Tensor], directions: list[Tensor | None], low: torch.dtype, known: bool
) -> None:
    def run(tensors: list[Tensor], directions: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        return forward_ad.unpack_dual(
            func(
                *(
                    t if d is None else forward_ad.make_dual(t, d)
                    for t, d in zip(tensors, directions, strict=True)
                )
            )
        )

    wide = [[None if t is None else t.double() for t in each] for each in (tensors, directions)]
    cache, kept = PrimalCache(), []
    with forward_ad.dual_level():
        with plain_attention():
            exact = run(*wide).tangent
        with torch.autocast("cpu", low):
            with plain_attention():
                theirs = run(tensors, directions)
            value = func(*tensors)
            if known:
                with cache, EveryResult(kept):
                    func(*tensors)
            with tangents_follow_gradients(cache, Ladder()), Names() as seen:
                ours = run(tensors, directions)
    assert ours.primal.dtype == ours.tangent.dtype == value.dtype
    assert torch.equal(ours.primal, value)
    # Half a unit of the last place, of which the rounding of float32 is a small part.
    unit = torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 1e-4
    torch.testing.assert_close(ours.tangent.double(), exact, rtol=0.51 * unit, atol=1e-5)
    # PyTorch's own is in float32 at times, beside a value that is not.
    errors = [(each.tangent.to(value.dtype) - exact).norm() for each in (ours, theirs)]
    assert errors[0] <= errors[1] + 1e-5 * exact.norm()
    assert {"aten::_softmax_backward_data", "aten::native_layer_norm_backward"} & {*seen.names}
