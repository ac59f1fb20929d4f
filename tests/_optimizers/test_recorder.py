"""Any step, recorded: values bitwise, derivatives against differences of the class run anew."""

import copy

import pytest
import torch
from torch import Tensor, nn, optim

from cases import UPDATE_RULES
from properties import assert_same
from reweight._optimizers.pseudo_update import pseudo_update
from reweight._optimizers.recorded_step import recorded_step
from reweight._optimizers.recorder import Recorder
from reweight._optimizers.rules import RULES
from steps import STEPS, Make, Taken, TrustRatio, slope_of, two_groups


def stock(name: str, **options: object) -> Make:
    return lambda parameters: getattr(optim, name)(two_groups(parameters), **options)


EVERY = STEPS | {
    "adafactor": stock("Adafactor"),
    "adafactor, foreach": stock("Adafactor", foreach=True),
    "muon": lambda parameters: optim.Muon([p for p in parameters if p.dim() == 2], lr=0.1),
    "amsgrad, fused": stock("AdamW", amsgrad=True, fused=True),
    "sgd of a subclass": lambda parameters: type("Mine", (optim.SGD,), {})(parameters, lr=0.1),
}
for _name in ("Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"):
    EVERY[_name] = stock(_name, lr=0.01, weight_decay=0.1)
    if _name != "RAdam":  # which divides by 0 there until it rectifies
        EVERY[f"{_name}, foreach"] = stock(_name, lr=0.01, foreach=True)
EVERY["SGD, Nesterov"] = stock("SGD", lr=0.1, momentum=0.9, nesterov=True)
for _name in ("Adafactor", "Muon"):  # not in every PyTorch
    if not hasattr(optim, _name):
        EVERY = {name: make for name, make in EVERY.items() if _name.lower() not in name}


def recorded(taken: Taken) -> tuple[list[Tensor], list[Tensor], Recorder]:
    """θ̂ of all parameters, and the gradients it depends on."""
    leaves = [g.clone().requires_grad_() for g in taken.gradients]
    held = {id(p) for group in taken.optimizer.param_groups for p in group["params"]}
    gradients = {id(p): g for p, g in zip(taken.parameters, leaves, strict=True) if id(p) in held}
    moved, recorder = recorded_step(taken.optimizer, gradients)
    return [moved.get(id(p), p.detach()) for p in taken.parameters], leaves, recorder


@pytest.mark.parametrize("num_steps", [0, 1, 6], ids=["fresh", "warm", "warmer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_values_are_bitwise_those_of_the_step(name, dtype, num_steps) -> None:
    if dtype is torch.bfloat16 and name == "projected":
        pytest.skip("PyTorch has no svd in bfloat16")
    taken = Taken(EVERY[name], dtype, num_steps)
    versions = [p._version for p in taken.parameters]
    values = [p.detach().clone() for p in taken.parameters]
    state = copy.deepcopy(taken.optimizer.state_dict())
    random = torch.get_rng_state()
    moved, _, _ = recorded(taken)
    assert torch.equal(random, torch.get_rng_state())
    assert_same(taken.optimizer.state_dict(), state)
    assert versions == [p._version for p in taken.parameters]
    assert all(map(torch.equal, values, taken.parameters))
    for new, own in zip(moved, taken.step(taken.gradients), strict=True):
        assert torch.equal(new, own)


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize("name", [name for name in EVERY if "muon" not in name])
def test_derivatives_are_those_of_differences(name: str, num_steps: int) -> None:
    taken = Taken(EVERY[name], num_steps=num_steps)
    moved, leaves, recorder = recorded(taken)
    c, u = ([torch.randn_like(t) for t in tensors] for tensors in (moved, leaves))
    u = [d * g.detach().abs() for d, g in zip(u, leaves, strict=True)]
    value = sum((a * m).sum() for a, m in zip(c, moved, strict=True))
    v = torch.autograd.grad(value, leaves)
    slope = sum((a * b).sum().item() for a, b in zip(v, u, strict=True))
    expected = slope_of(EVERY[name], c, u, num_steps=num_steps)
    assert abs(expected) > 1e-6
    # Second-order differences at 1e-5 in float64: 1e-11 of rounding, 1e-10 of curvature.
    assert slope == pytest.approx(expected, rel=1e-5)
    assert not recorder.has_constants
    assert not recorder.lost


@pytest.mark.parametrize("name", [name for name in EVERY if "muon" in name])
def test_the_derivative_of_what_runs_in_bfloat16_is_that_in_float32(name: str) -> None:
    """That in bfloat16 would be off by a tenth."""
    taken = Taken(EVERY[name], torch.float32)
    moved, leaves, recorder = recorded(taken)
    assert recorder.is_widened
    (v,) = torch.autograd.grad(moved[0].sum(), leaves[0])
    exact = wide_muon_derivative(name)
    assert (v - exact).norm() < 1e-4 * exact.norm()


def wide_muon_derivative(name: str) -> Tensor:
    """By double precision throughout, of the iteration written out."""
    taken = Taken(EVERY[name], torch.float32)
    state, group = taken.optimizer.state[taken.parameters[0]], taken.optimizer.param_groups[0]
    g = taken.gradients[0].double().requires_grad_()
    if name == "muon":
        momentum, steps, rate = group["momentum"], group["ns_steps"], group["lr"]
        buffer = state["momentum_buffer"].double().lerp(g, 1 - momentum)
        x = g.lerp(buffer, momentum).T  # of a tall matrix
        rate *= max(1, 4 / 3) ** 0.5
    else:
        steps, rate = 3, group["lr"]
        x = state["buffer"].double().lerp(g, 0.1)
    x = x / (x.norm() + 1e-7) if name != "muon" else x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return torch.autograd.grad((-rate * x).sum(), g)[0].float()


HELD = [name for name, make in UPDATE_RULES.items() if "tensor" not in name]


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_the_rules_agree_with_the_recorded_step(name: str, num_steps: int) -> None:
    torch.set_default_dtype(torch.float64)  # which torch.optim counts steps in
    try:
        model = nn.Module()

        def make(parameters: list[nn.Parameter]) -> optim.Optimizer:
            model.held = nn.ParameterList(parameters)
            return UPDATE_RULES[name](model)

        taken = Taken(make, num_steps=num_steps)
        if type(taken.optimizer) not in RULES:
            pytest.skip("there is no rule")
        by_rule = pseudo_update([taken.optimizer], taken.named, leaves := taken.leaves())
        moved, others, _ = recorded(taken)
    finally:
        torch.set_default_dtype(torch.float32)
    for new, other in zip(by_rule.parameters.values(), moved, strict=True):
        assert (new - other).abs().max() < 1e-12
    c = [torch.randn_like(m) for m in moved]
    v, expected = (
        torch.autograd.grad(list(outputs), list(inputs), c)
        for outputs, inputs in (
            (by_rule.parameters.values(), leaves.values()),
            (moved, others),
        )
    )
    for ours, theirs in zip(v, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm() + 1e-12


def test_a_view_that_is_written_to_keeps_the_derivative_of_the_rest() -> None:
    """Where strides are not contiguous ``as_strided_scatter`` has a wrong derivative."""

    class Columns(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            p = self.param_groups[0]["params"][0]
            whole = p.grad.t().clone(memory_format=torch.preserve_format)
            whole[:, 1:3].mul_(2).add_(1)
            whole.t()[0].mul_(5)
            p.copy_(whole.t())

    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    g = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (moved,) = recorded_step(Columns([p]), {id(p): g}).parameters.values()
    c = torch.randn_like(g)
    factor = torch.tensor([5.0, 2, 2, 1], dtype=torch.float64)[:, None]
    assert torch.equal(torch.autograd.grad(moved, g, c)[0], c * factor)


@pytest.mark.parametrize("part", [lambda both: both[1], lambda both: both[..., 1].T.mT])
def test_a_view_of_what_was_copied_from_a_view(part) -> None:
    class Copies(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            (p,) = self.param_groups[0]["params"]
            both = part(torch.stack([p.grad, 2 * p.grad, 3 * p.grad]))
            p.sub_(torch.zeros(3, 3).copy_(both).t())

    p = nn.Parameter(torch.zeros(3, 3))
    g, c = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    (moved,) = recorded_step(Copies([p]), {id(p): g}).parameters.values()
    expected = -part(torch.stack([g, 2 * g, 3 * g])).t()
    assert torch.equal(moved, expected)
    assert torch.equal(*(torch.autograd.grad(new, g, c)[0] for new in (moved, expected)))


def test_nothing_reaches_memory_by_a_resize() -> None:
    class Resizes(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            (p,) = self.param_groups[0]["params"]
            torch.cat([p.grad, p.grad], out=self.kept)
            p.sub_(self.kept[: len(p)])

    p = nn.Parameter(torch.ones(3))
    optimizer = Resizes([p])
    optimizer.kept = torch.full((2,), 7.0)
    recorded_step(optimizer, {id(p): torch.ones(3, requires_grad=True)})
    assert torch.equal(optimizer.kept, torch.full((2,), 7.0))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda p: p.numpy(), "reads memory itself, by Tensor.numpy"),
        (lambda p: p.data_ptr(), "reads memory itself, by Tensor.data_ptr"),
        (lambda p: p.grad.view(torch.int64).add_(1), "reads the bits of numbers"),
        (lambda p: p.to_sparse(), "layout"),
    ],
)
def test_what_is_not_arithmetic_is_refused(what, reason: str) -> None:
    class Odd(TrustRatio):
        @torch.no_grad()
        def step(self) -> None:
            (p,) = self.param_groups[0]["params"]
            p.grad.mul_(2)
            what(p).sum()

    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    g = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=reason):
        recorded_step(Odd([p]), {id(p): g})


def test_names_of_pytorch_that_are_not_public_are_there() -> None:
    assert callable(torch._C._ForceDispatchKeyGuard)
    assert callable(torch._C._dispatch_tls_local_include_set)
    assert callable(torch._C._dispatch_tls_local_exclude_set)
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert type(optimizer).step.hooked
    assert callable(type(optimizer).step.__wrapped__)
