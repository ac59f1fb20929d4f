"""A model of torch.compile in the step: each pass in one graph, results as without it."""

import copy
import logging
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.optim import SGD

from cases import Fixed, make_batch, make_model, warm_up
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from reweight._passes.compiled import CompiledModel
from reweight._passes.functional import run_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:Guards may run slower"),  # on Python 3.13.0
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),
]
needs_it = pytest.mark.skipif(
    not hasattr(torch._dynamo, "error_on_graph_break"), reason="runs uncompiled by older PyTorch"
)


NUM_EXITS = 2


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch.compiler.reset()


def steps(
    model: nn.Module, optimizer: SGD, name: str, through: str = "step", **options: object
) -> tuple[MetaReweightStep, dict[str, Tensor]]:
    """Two steps, and everything that they left behind."""
    torch.manual_seed(3)
    reweighter = Fixed(torch.rand(7, NUM_EXITS, dtype=torch.float64) + 0.5)
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter,
        # Long, so that the weights, which are of the order of 1, do not round the hypergradient.
        reweighter_optimizer=SGD(reweighter.parameters(), lr=100.0),
        objective=MeanObjective(),
        **options,  # type: ignore[arg-type]
    )
    train, meta = make_batch(name, seed=1), make_batch(name, seed=2)
    for _ in range(2):
        getattr(step, "__call__" if through == "step" else through)(train, meta)
    inner = getattr(model, "_orig_mod", model)
    found = {"weights": reweighter.weights.detach(), **copy.deepcopy(inner.state_dict())}
    found |= {f"{n}.grad": p.grad for n, p in inner.named_parameters() if p.grad is not None}
    return step, found | {"random state": torch.get_rng_state()}


def twins(model: nn.Module, name: str, backend: object) -> list[tuple[nn.Module, SGD]]:
    """The same model and optimizer, eager and compiled, both after the same plain steps."""
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm_up(model, optimizer, make_batch(name))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    return [(model, optimizer), (torch.compile(twin, backend=backend), twin_optimizer)]


def logged(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "reweight"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


# float64: some 1e2 operations that round by 1e-16 each, and the rate of 100.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def make_small(name: str) -> nn.Module:
    """One block in place of three, which would be compiled the same way three times."""
    model = make_model(name, NUM_EXITS)
    if name != "tied":
        model.blocks = nn.ModuleList([model.blocks[0], nn.Identity(), nn.Identity()])
    return model


def make_normalised() -> nn.Module:
    """The least that has buffers which move."""
    model = make_small("mlp")
    model.blocks[1] = nn.BatchNorm1d(6).double()
    return model


@needs_it
@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("conv_batch_norm", "step"),
        ("transformer_dropout", "step"),
        ("tied", "step"),
        ("mlp", "update_reweighter"),
    ],
)
def test_each_pass_is_one_graph_with_the_same_result(name: str, through: str, caplog) -> None:
    """aot_eager draws the random numbers that eager code draws, so that dropout is compared too."""
    aot_eager, graphs = torch._dynamo.lookup_backend("aot_eager"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model = make_normalised() if name == "mlp" else make_small(name)
    eager, compiled = twins(model, name, backend)
    _, expected = steps(*eager, name, through)
    step, found = steps(*compiled, name, through)
    assert step._forward.compiled is not None
    assert len(graphs) == 3  # train, meta and forward mode; none broken, none made again
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not logged(caplog)
    assert_same(found, expected, **CLOSE)


class Normalised(nn.Module):
    """BatchNorm between convolutions, LayerNorm, and a tensor that is unflattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.norm(self.first(x)).relu()).mean((2, 3))
        return self.head(torch.cat([y, y.unflatten(1, (2, 2)).flip(1).flatten(1)], 1))


@needs_it
@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_compiler_stumbles_over_in_forward_mode_is_compiled(autocast, caplog) -> None:
    """Under autocast norms with weights in float32; and `Tensor.unflatten`."""
    generator = torch.Generator().manual_seed(0)
    train, meta = (
        (torch.randn(8, 1, 5, 5, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(2)
    )
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = Normalised()
        optimizer = SGD(model.parameters(), lr=0.1)
        whole = torch.compile(model, backend="aot_eager") if compile else model
        step = MetaReweightStep(whole, optimizer, SampleReweighter(1, form="sigmoid"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step.backward(train, meta).hypergradient)
    assert step._forward.compiled is not None, logged(caplog)
    # In bfloat16 a tangent is rounded in other places, by 4e-3 of its size some ten times.
    assert (found[0] - found[1]).norm() <= (3e-2 if autocast else 1e-5) * found[0].norm()


@needs_it
def test_options_of_the_step() -> None:
    """One after the other: what is compiled for the first serves all, but for a part of a batch."""
    for options in ({"lagged": True}, {"lean": True}, {"interval": 2}, {"train_fraction": 0.6}):
        eager, compiled = twins(make_normalised(), "mlp", "aot_eager")
        _, expected = steps(*eager, "mlp", **options)
        step, found = steps(*compiled, "mlp", **options)
        assert step._forward.compiled is not None, options
        assert_same(found, expected, **CLOSE)


@needs_it
def test_batches_of_changing_size() -> None:
    """Graphs for any size are completed only in the backward."""
    states = []
    for model, optimizer in twins(make_normalised(), "mlp", "aot_eager"):
        torch.manual_seed(3)
        step = MetaReweightStep(model, optimizer, SampleReweighter(NUM_EXITS).double())
        for size in (7, 5, 6, 7):
            step(make_batch("mlp", size, seed=1), make_batch("mlp", size, seed=2))
        inner = getattr(model, "_orig_mod", model)
        states.append(copy.deepcopy({**inner.state_dict(), **step.reweighter.state_dict()}))
    assert step._forward.compiled is not None
    assert_same(*states, **CLOSE)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4))
        self.exits = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.layers(x)
        return [self.exits[0](x), self.exits[1](nn.functional.dropout(x, 0.3))]


@needs_it
def test_inductor_draws_the_same_masks_in_every_pass() -> None:
    """Its own ones, not those of eager code: the oracle is the compiled forward itself."""
    torch.manual_seed(0)
    model, x = Dropping().double(), torch.randn(9, 6, dtype=torch.float64)
    compiled = CompiledModel.of(torch.compile(model))
    assert compiled is not None
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tangents = {name: torch.randn_like(parameter) for name, parameter in own.items()}

    def at(parameters: dict[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return run_with(model, fresh | parameters, lambda: compiled(x))

    def along(distance: float) -> list[Tensor]:
        return at({n: (p + distance * tangents[n]).requires_grad_() for n, p in own.items()})

    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in own.items()}
        values, changes = zip(*(forward_ad.unpack_dual(z) for z in at(duals)), strict=True)
    leaves = {name: parameter.clone().requires_grad_() for name, parameter in own.items()}
    logits, h = at(leaves), 1e-5
    for value, change, here, above, below in zip(
        values, changes, logits, along(h), along(-h), strict=True
    ):
        torch.testing.assert_close(value, here.detach(), rtol=1e-12, atol=1e-12)
        # h² of the third derivative, and 1e-16 / h of rounding.
        slope = (above - below).detach() / (2 * h)
        torch.testing.assert_close(change, slope, rtol=1e-6, atol=1e-7)
    total = torch.stack([z.sum() for z in logits]).sum()
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(total, list(leaves.values()))
    assert all(map(torch.equal, first, again)), "no memory given away"
    product = sum((g * t).sum() for g, t in zip(first, tangents.values(), strict=True))
    torch.testing.assert_close(sum(change.sum() for change in changes), product)


class Wrapped(nn.Module):
    """Dropout, a layer, and something else; two exits."""

    def __init__(self, function: Callable[[Tensor], Tensor], out: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.function, self.out = make_small("mlp"), function, out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.net(self.function(nn.functional.dropout(x, 0.2))))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Boxed:
    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


@needs_it
@pytest.mark.parametrize(
    ("function", "out", "exits", "through"),
    [
        (broken, list, None, "step"),
        (nn.Identity(), Boxed, attrgetter("logits"), "update_reweighter"),
    ],
    ids=["graph break", "unknown container"],
)
def test_what_does_not_compile_runs_uncompiled(function, out, exits, through, caplog) -> None:
    def set_up(backend: str | None):
        torch.manual_seed(0)
        model = Wrapped(function, out)
        optimizer = SGD(model.parameters(), lr=0.1)
        return (model if backend is None else torch.compile(model, backend=backend)), optimizer

    _, expected = steps(*set_up(None), "mlp", through, exits=exits)
    with caplog.at_level(logging.WARNING, "reweight"):
        step, found = steps(*set_up("aot_eager"), "mlp", through, exits=exits)
    assert step._forward.compiled is None
    assert [line.split(":")[0] for line in logged(caplog)] == [
        "The model runs uncompiled from here on"
    ]
    assert_same(found, expected, rtol=0, atol=0)


@torch.library.custom_op("reweight_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: 2 * gradient)


class Ruled(torch.autograd.Function):
    """A backward, and a jvp, that are not the derivative of the forward."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@needs_it
@pytest.mark.parametrize(
    "function", [lambda x: doubled(x), Ruled.apply], ids=["custom operation", "custom jvp"]
)
def test_what_loses_its_tangents_in_compiled_code_runs_uncompiled(function, caplog) -> None:
    def set_up(compile: bool):
        torch.manual_seed(0)
        model = make_small("mlp")
        model.blocks[1] = Lambda(function)
        optimizer = SGD(model.parameters(), lr=0.1)
        return (torch.compile(model, backend="aot_eager") if compile else model), optimizer

    _, expected = steps(*set_up(False), "mlp")
    with caplog.at_level(logging.WARNING, "reweight"):
        step, found = steps(*set_up(True), "mlp")
    assert step._forward.compiled is None
    assert step.estimator == "auto"
    assert ["would not have the tangents" in line for line in logged(caplog)] == [True]
    assert_same(found, expected, rtol=0, atol=0)


def test_other_estimators_run_uncompiled() -> None:
    model = make_small("mlp")
    for estimator in ("unrolled", "finite_difference"):
        optimizer = SGD(model.parameters(), lr=0.1)
        compiled = torch.compile(model, backend="aot_eager")
        step, _ = steps(compiled, optimizer, "mlp", estimator=estimator)
        assert step._forward.compiled is None
