"""What models can be trained, and how: each row of docs/compatibility.md is a test here.

The oracle is the meta objective itself: its slope along a random change of the weights, by central
differences around a real step of the real optimizer.
"""

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Fixed, conventional_loss, warm_up
from model_rows import (
    DIFFERENCES,
    ROWS,
    Calls,
    Row,
    Square,
    batch,
    custom_square,
    linear,
    net,
    normalised_without_gradient,
    out_of_sight,
    penalised,
    rungs,
    set_up,
)
from references import meta_objective
from reweight import MeanObjective, MetaReweightStep
from reweight._passes import memory


def slope_by_double_backward(step: MetaReweightStep, train, meta, direction: Tensor) -> float:
    twin = copy.deepcopy(step)
    twin._estimator.name = "unrolled"
    twin._forward.compiled = None  # compiled code has no second order
    weights = twin.reweighter.weights.detach().clone()
    twin.update_reweighter(train, meta)
    return ((weights - twin.reweighter.weights.detach()) * direction).sum().item()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize(
    ("name", "through"),
    [(name, "backward") for name in ROWS]
    # Those of torch.compile go both ways in tests/_passes/test_compiled.py.
    + [(name, "update_reweighter") for name in ROWS if not name.startswith("torch.compile")],
)
def test_model(name: str, through: str, caplog) -> None:
    row = ROWS[name]
    model, optimizer, train, meta = set_up(row)
    reweighter = Fixed(torch.rand(8, 2, dtype=torch.float64) + 0.5)
    weights = reweighter.weights.detach().clone()
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter,
        reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
        objective=MeanObjective(),
    )
    warm_up(model, optimizer, train)
    plain = getattr(model, "_orig_mod", model)
    direction = torch.randn(8, 2, dtype=torch.float64)
    before = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    held = dict(model.named_parameters())
    if row.cuts:
        slope = slope_by_double_backward(step, train, meta, direction)
    else:
        values = [
            meta_objective(
                plain,
                optimizer,
                Fixed(weights + sign * 1e-4 * direction),
                train,
                meta,
                conventional_loss,
            )
            for sign in (1, -1)
        ]
        slope = (values[0] - values[1]) / 2e-4
    with caplog.at_level(logging.WARNING, "reweight"):
        getattr(step, through)(train, meta)
    hypergradient = weights - reweighter.weights.detach()
    assert step.estimator == ("finite_difference" if row.how == DIFFERENCES else "auto")
    if row.how != DIFFERENCES:
        assert set(step._estimator.ladder.ways.values()) == rungs(name, row.how)
    logged = [record.message for record in caplog.records if record.name == "reweight"]
    assert len(logged) == (row.how == DIFFERENCES), "one line that names the operation"
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    tolerance = 1e-3 if row.how == DIFFERENCES else 1e-5
    assert (hypergradient * direction).sum().item() == pytest.approx(slope, rel=tolerance)
    if through == "update_reweighter":
        assert torch.equal(torch.get_rng_state(), before[1])
        for buffer, value in zip(model.buffers(), before[0].values(), strict=True):
            assert torch.equal(buffer, value)


def recorded(model: nn.Module, optimizer, train, meta, **options) -> tuple[Tensor, object]:
    """The hypergradient at once; weights of 1 would round it."""
    weights = torch.linspace(0.5, 1.5, 16, dtype=next(model.parameters()).dtype).view(8, 2)
    fixed = Fixed(weights)
    step = MetaReweightStep(
        model,
        optimizer,
        fixed,
        reweighter_optimizer=SGD(fixed.parameters(), lr=1e6),
        objective=MeanObjective(),
        **options,
    )
    torch.manual_seed(3)
    step.update_reweighter(train, meta)
    return (weights - fixed.weights.detach()) / 1e6, step


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.how != DIFFERENCES])
def test_model_in_single_precision(name: str) -> None:
    """Other kernels run there. The reference is double backward, in float64 if that has none."""
    row = ROWS[name]
    model, optimizer, train, meta = set_up(row, torch.float32)
    warm_up(getattr(model, "_orig_mod", model), optimizer, train)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    found, step = recorded(model, optimizer, train, meta)
    assert step.estimator == "auto"
    assert set(step._estimator.ladder.ways.values()) == rungs(name, row.single or row.how)
    if row.unrolls:
        twin, options = getattr(twin, "_orig_mod", twin), {"estimator": "unrolled"}
        expected, _ = recorded(twin, twin_optimizer, train, meta, **options)
    else:
        train, meta = (
            (x.double() if x.is_floating_point() else x, target) for x, target in (train, meta)
        )
        for state in twin_optimizer.state.values():
            state.update({name: value.double() for name, value in state.items()})
        expected, _ = recorded(twin.double(), twin_optimizer, train, meta)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.detach(), lambda x: x * x.data, normalised_without_gradient],
    ids=["detach", "data", "no_grad"],
)
def test_differences_warn_where_they_are_wrong(function) -> None:
    row = Row(lambda: net(linear(), Calls(function)))
    model, optimizer, train, meta = set_up(row)
    step = MetaReweightStep(
        model, optimizer, Fixed(torch.rand(8, 2).double()), estimator="finite_difference"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.backward(train, meta)
    told = [str(each.message) for each in caught]
    assert any("cuts tensors from the graph" in message for message in told)
    assert any("do not agree with the backward" in message for message in told)


def test_a_cut_of_constants_is_none() -> None:
    """As of rotary embeddings; warnings are errors here."""

    def turned(x: Tensor) -> Tensor:
        with torch.no_grad():
            angles = torch.arange(x.shape[-1]).to(x)
        return x * angles.cos()

    model, optimizer, train, meta = set_up(Row(lambda: net(linear(), Calls(turned))))
    fixed = Fixed(torch.rand(8, 2).double())
    MetaReweightStep(model, optimizer, fixed, estimator="finite_difference").backward(train, meta)


class CountFused(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "flash" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def test_every_value_of_attention_is_the_fused_kernels(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_LARGE", 0)  # or nothing is recalled of so small a net
    model, optimizer, train, meta = set_up(ROWS["nn.MultiheadAttention, fused"])
    with CountFused() as plain:
        model(train[0])
    step = MetaReweightStep(
        model, optimizer, Fixed(torch.rand(8, 2).double()), objective=MeanObjective()
    )
    with CountFused() as ours:
        step.backward(train, meta)
    assert plain.calls > 0
    # The train and the meta forward; the forward-mode pass recalls the values of the first.
    assert ours.calls == 2 * plain.calls


class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net(linear(), linear())

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [logits.float() for logits in self.inner(x)]


def test_differences_see_low_precision_inside_the_model() -> None:
    torch.manual_seed(0)
    model = AutocastInside()
    train, meta = ((x.float(), y) for x, y in (batch("features", 1), batch("features", 2)))
    found = []
    for estimator in ("forward", "finite_difference"):
        weights = torch.ones(8, 2)
        fixed = Fixed(weights)
        step = MetaReweightStep(
            model,
            SGD(model.parameters(), lr=0.1),
            fixed,
            reweighter_optimizer=SGD(fixed.parameters(), lr=1.0),
            objective=MeanObjective(),
            estimator=estimator,
        )
        step.update_reweighter(train, meta)
        found.append(weights - step.reweighter.weights.detach())
    exact, near = found
    assert (near - exact).norm() < 0.2 * exact.norm()


def teacher_without_gradient(outputs: list[Tensor], target: Tensor) -> Tensor:
    with torch.no_grad():
        soft = outputs[-1].softmax(1)
    losses = [F.cross_entropy(z, target, reduction="none") for z in outputs]
    return torch.stack(losses, 1) + F.cross_entropy(outputs[0], soft, reduction="none").unsqueeze(1)


def teacher_by_inference(outputs: list[Tensor], target: Tensor) -> Tensor:
    with torch.inference_mode():
        soft = outputs[-1].softmax(1).exp()
    losses = [F.cross_entropy(z, target, reduction="none") for z in outputs]
    return torch.stack(losses, 1) * soft[:, :1].clone()


def scaled_by_a_constant_gradient(outputs: list[Tensor], target: Tensor) -> Tensor:
    losses = torch.stack([F.cross_entropy(z, target, reduction="none") for z in outputs], 1)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(losses.sum(), outputs[0], retain_graph=True)
    return losses * (1 + slope.norm(dim=1, keepdim=True))


def custom_loss(outputs: list[Tensor], target: Tensor) -> Tensor:
    losses = [F.cross_entropy(z, target, reduction="none") for z in outputs]
    return custom_square(torch.stack(losses, 1)) + Square.apply(losses[0]).unsqueeze(1)


def exits_without_gradient(outputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        scale = outputs[1].norm()
    return [outputs[0] / scale, outputs[1]]


@pytest.mark.parametrize(
    "options",
    [
        {"loss": teacher_without_gradient},
        {"loss": teacher_by_inference},
        {"loss": scaled_by_a_constant_gradient},
        {"loss": custom_loss},
        {"exits": exits_without_gradient},
    ],
    ids=lambda options: next(iter(options.values())).__name__,
)
def test_exits_and_loss_are_in_the_context_of_the_model(options) -> None:
    found, expected = (
        hypergradient(lambda: net(linear(), linear()), estimator=estimator, **options)
        for estimator in ("forward", "unrolled")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # rounding


@pytest.mark.filterwarnings("ignore:The model cuts tensors")
def test_finite_differences_give_gradients_within_the_forward_their_graph() -> None:
    found, expected = (
        hypergradient(lambda: net(linear(), Calls(penalised)), estimator=estimator)
        for estimator in ("finite_difference", "unrolled")
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_cached_parametrizations_are_refused() -> None:
    model, optimizer, train, meta = set_up(ROWS["weight_norm"])
    step = MetaReweightStep(model, optimizer, Fixed(torch.rand(8, 2).double()))
    with (
        torch.nn.utils.parametrize.cached(),
        pytest.raises(ValueError, match=r"parametrize.cached\(\)"),
    ):
        step.backward(train, meta)


def test_auto_falls_back_when_the_operation_comes_late(caplog) -> None:
    model, optimizer, train, meta = set_up(ROWS["dropout"])
    step = MetaReweightStep(model, optimizer, Fixed(torch.rand(8, 2).double()))
    step.backward(train, meta)
    assert step.estimator == "auto"
    model.blocks[1].append(Calls(out_of_sight).double())
    result = step.backward(train, meta)
    assert step.estimator == "finite_difference"
    assert result.meta_loss is not None


def mask_in_place(gradient: Tensor) -> None:
    gradient[::2] = 0


def projected(gradient: Tensor) -> Tensor:
    return gradient - gradient.mean(0)


HOOKS = {
    "mask": lambda gradient: gradient * (torch.arange(gradient.shape[0]) % 2).unsqueeze(1),
    "mask in place": mask_in_place,
    "factor": lambda gradient: gradient * 0.1,
    "projection": projected,
    "nothing": lambda gradient: None,
}


def hypergradient(build, **options) -> Tensor:
    torch.manual_seed(0)
    model = build().double()
    train, meta = batch("features", seed=1), batch("features", seed=2)
    weights = torch.linspace(0.5, 1.5, 16).double().view(8, 2)
    fixed = Fixed(weights)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        fixed,
        reweighter_optimizer=SGD(fixed.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    )
    step.backward(train, meta)
    return weights - fixed.weights.detach()


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize(
    "options",
    [{}, {"lagged": True}, {"lean": True}, {"estimator": "finite_difference"}],
    ids=["forward", "lagged", "lean", "finite_difference"],
)
def test_hooks_of_parameters_are_part_of_the_step(hook, options) -> None:
    def build() -> nn.Module:
        model = net(linear(), linear())
        model.blocks[0][0].weight.register_hook(hook)
        model.exits[1].head.weight.register_hook(hook)
        return model

    expected = hypergradient(build, estimator="unrolled")
    tolerance = 1e-4 if "estimator" in options else 1e-10  # of differences; of rounding
    torch.testing.assert_close(
        hypergradient(build, **options), expected, rtol=tolerance, atol=tolerance * 1e-2
    )


def hooked(how: str) -> nn.Module:
    model = net(linear(), linear())
    if how == "nonlinear hook of a parameter":
        model.blocks[0][0].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    if how == "hook of a module":
        model.blocks[1].register_full_backward_hook(lambda module, ins, outs: (ins[0] / 9,))
    if how == "hook that looks":
        model.blocks[1].register_full_backward_hook(lambda module, ins, outs: None)
    if how == "low precision inside":
        model.blocks[1].append(Calls(lambda x: x.bfloat16().double()).double())
    return model


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("nonlinear hook of a parameter", True),
        ("hook of a module", True),
        ("hook that looks", False),
        ("low precision inside", False),
    ],
)
def test_a_backward_that_is_no_derivative_is_told(how: str, expected: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hypergradient(lambda: hooked(how))
    told = ["do not agree with the backward" in str(one.message) for one in caught]
    assert told == [True] * expected


def test_asking_for_forward_mode_where_there_is_none_says_what_to_do() -> None:
    model, optimizer, train, meta = set_up(ROWS["an extension in C++ without forward mode"])
    step = MetaReweightStep(model, optimizer, Fixed(torch.rand(8, 2).double()), estimator="forward")
    with pytest.raises(NotImplementedError, match="Use estimator='finite_difference'"):
        step.backward(train, meta)


def table() -> str:
    """The rows of docs/compatibility.md."""
    return "\n".join(
        f"| {name} | {row.how} | {row.single or row.how} |" for name, row in ROWS.items()
    )


def test_the_table_in_the_documentation_is_this_one() -> None:
    page = Path(__file__).parents[1] / "docs" / "compatibility.md"
    assert table() in page.read_text(), "run python tests/test_models.py for the rows"


if __name__ == "__main__":
    print(table())
