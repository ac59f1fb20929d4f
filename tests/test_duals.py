"""The forward-mode pass: recalled values are those computed again, the rules are PyTorch's own."""

import copy
import random
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from cases import EXITS, MODELS, OPTIMIZERS, MultiExit, make_batch, make_model, warm_up
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from reweight._kernels import function
from reweight._passes import forward, forward_mode, primal_cache
from reweight._passes.forward_mode import tangents_follow_gradients
from reweight._passes.ladder import Ladder
from reweight._passes.primal_cache import PrimalCache
from test_models import ROWS, set_up


@pytest.fixture
def recalled(monkeypatch) -> list[Tensor]:
    """Everything is worth recalling; what was."""
    found: list[Tensor] = []
    ask = PrimalCache.recall

    def recall(self, product) -> Tensor | None:
        value = ask(self, product)
        if value is not None:
            found.append(value)
        return value

    monkeypatch.setattr(primal_cache, "_LARGE", 0)
    monkeypatch.setattr(PrimalCache, "recall", recall)
    return found


def outcome(model: nn.Module, train, meta, seed: int = 0, **options) -> list[Tensor]:
    """What a step leaves behind: gradients, buffers, reweighter, random state."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    num_exits = len(model(train[0]))
    reweighter = SampleReweighter(num_exits)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        reweighter.to(train[0].dtype if train[0].is_floating_point() else torch.float64),
        reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    )
    step.backward(train, meta)
    gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    return [*gradients, *model.buffers(), *reweighter.parameters(), torch.get_rng_state()]


def assert_bitwise(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


def forget(monkeypatch) -> None:
    monkeypatch.setattr(PrimalCache, "recall", lambda self, product: None)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize("name", ROWS)
def test_recalled_values_change_nothing(name: str, recalled, monkeypatch) -> None:
    model, _, train, meta = set_up(ROWS[name])
    model = getattr(model, "_orig_mod", model)
    with_recall = outcome(model, train, meta)
    forget(monkeypatch)
    assert_bitwise(outcome(model, train, meta), with_recall)


def test_products_whose_values_the_graph_holds_are_recalled(recalled, monkeypatch) -> None:
    model, train, meta = (
        make_model("conv_batch_norm"),
        make_batch("conv_batch_norm"),
        make_batch("conv_batch_norm", seed=2),
    )
    outcome(model, train, meta)
    assert sum(value.dim() == 4 for value in recalled) == 3, "all convolutions"


def test_large_logits_are_recalled_and_change_nothing(recalled, monkeypatch) -> None:
    model = make_model("mlp")
    train, meta = make_batch("mlp"), make_batch("mlp", seed=2)
    monkeypatch.setattr(function, "_SMALL", 0)
    with_logits = outcome(model, train, meta)
    num_exits, logits = len(model(train[0])), model(train[0])[0]
    assert sum(value.shape == logits.shape for value in recalled) == num_exits
    monkeypatch.setattr(forward, "logits_kept", lambda kept: nullcontext())
    assert_bitwise(outcome(model, train, meta), with_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recalled_values_change_nothing_under_autocast(dtype, recalled, monkeypatch) -> None:
    model = make_model("conv_batch_norm").float()
    train, meta = (
        (inputs.float(), target)
        for inputs, target in (make_batch("conv_batch_norm"), make_batch("conv_batch_norm", seed=2))
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with_recall = outcome(model, train, meta)
        forget(monkeypatch)
        assert_bitwise(outcome(model, train, meta), with_recall)


class Layer(nn.Module):
    """A convolution to whose input or output something happens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.noise = how, random.Random(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.how == "another draw":
            x = x * self.noise.random()
        y = self.conv(x)
        change = CHANGES.get(self.how)
        if change is not None:
            change(y)
        z = y.sin()  # whose graph holds y
        if self.how == "output changed in the forward-mode pass" and not y.requires_grad:
            y.mul_(2)
        return [self.head(z.mean((2, 3)))]


def replace_data(y: Tensor) -> None:
    y.data = y.detach() * 2


CHANGES = {
    "output changed": lambda y: y.relu_(),
    "view of the output changed": lambda y: y[0].mul_(2),
    "data changed": lambda y: y.data.mul_(2),
    "data of a view changed": lambda y: y[0].data.mul_(2),
    "data replaced": replace_data,
    "array changed": lambda y: np.multiply(y.detach().numpy(), 2, out=y.detach().numpy()),
}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("nothing", True),
        pytest.param(
            "another draw",
            False,  # and the step says that the forward differs
            marks=pytest.mark.filterwarnings("ignore:Hypergradients are approximate"),
        ),
        *((change, False) for change in CHANGES),
        ("output changed in the forward-mode pass", True),
    ],
)
def test_a_stale_value_is_not_recalled(how: str, expected: bool, recalled, monkeypatch) -> None:
    model = Layer(how).double()
    train, meta = (
        (torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(2)
    )
    with_recall = outcome(model, train, meta)
    assert any(value.dim() == 4 for value in recalled) == expected
    forget(monkeypatch)
    assert_bitwise(outcome(model, train, meta), with_recall)


def values_of(func, *tensors) -> tuple[PrimalCache, Tensor]:
    noted = PrimalCache()
    with noted:
        result = func(*tensors)
    return noted, result


def test_changed_bytes_are_noticed(recalled) -> None:
    """Even those that compare as equal, and those of equal places."""
    x, weight = torch.zeros(2, 4), torch.randn(3, 4, requires_grad=True)
    for change in (lambda: x.clone(), lambda: -x, lambda: x.clone().fill_(torch.nan)):
        noted, result = values_of(F.linear, x, weight)
        again = noted.recall(primal_cache.Product.of(F.linear, change(), weight.detach()))
        assert (again is not None) == torch.equal(change().view(torch.int32), x.view(torch.int32))
    noted, result = values_of(F.linear, x, weight)
    with torch.no_grad():
        weight.add_(1)
    assert noted.recall(primal_cache.Product.of(F.linear, x, weight.detach())) is None
    noted, result = values_of(F.linear, x, weight)
    del result
    assert noted.recall(primal_cache.Product.of(F.linear, x, weight.detach())) is None, (
        "not kept alive"
    )


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
def test_rules_are_forward_mode(name: str, moving: tuple[bool, ...], monkeypatch) -> None:
    monkeypatch.setattr(primal_cache, "_LARGE", 0)
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

    monkeypatch.setattr(
        forward_mode, "_RULES", {f: observed(rule) for f, rule in forward_mode._RULES.items()}
    )
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


@pytest.mark.parametrize("num_exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_lean_steps_are_the_same_steps(model_name, optimizer_name, num_exits) -> None:
    """Bitwise: gradients, parameters, buffers, reweighter, results, random state."""
    train, meta = make_batch(model_name, seed=1), make_batch(model_name, num_samples=9, seed=2)
    ends = []
    for lean in (False, True):
        model = make_model(model_name, num_exits)
        optimizer = OPTIMIZERS[optimizer_name](model)
        warm_up(model, optimizer, train)
        reweighter = SampleReweighter(num_exits, num_hidden=3).double()
        step = MetaReweightStep(model, optimizer, reweighter, lean=lean)
        results = [step(train, meta) for _ in range(2)]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        kept = [*model.parameters(), *model.buffers(), *reweighter.parameters()]
        found = [
            t for r in results for t in (r.losses.losses, r.weights, r.train_loss, r.meta_loss)
        ]
        ends.append([*gradients, *kept, *found, torch.get_rng_state()])
    assert_bitwise(*ends)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize("name", ROWS)
def test_lean_steps_are_the_same_for_every_model(name: str) -> None:
    model, _, train, meta = set_up(ROWS[name])
    model = getattr(model, "_orig_mod", model)
    assert_bitwise(outcome(model, train, meta, lean=True), outcome(model, train, meta))
