"""exit_cross_entropy and its linear form in every order and mode, against PyTorch's own functions.

Each check computes something from losses as a function of one tensor, twice: with ours and with
``F.cross_entropy``. A wrong derivative must show, or the check must raise.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, func
from torch.profiler import ProfilerActivity, profile

from reweight import exit_cross_entropy, linear_exit_cross_entropy
from reweight._kernels import function

# Forward mode, tracing and the compiler warn of what is PyTorch's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Please use `torch.vmap`"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]

NUM_SAMPLES, NUM_CLASSES, WIDTH = 4, 5, 3
TARGET = torch.tensor([0, 4, -100, 2])
TARGET_OF_FEWER = torch.tensor([0, 1, -100, 2])
SCALES = torch.linspace(0.5, 2, 2 * NUM_SAMPLES, dtype=torch.float64).view(NUM_SAMPLES, 2)

Function = Callable[[Tensor], Tensor]
Forms = dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]]


def usual(exits: list[Tensor], target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The independent twin."""
    return torch.stack(
        [
            F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
            for z in exits
        ],
        1,
    )


def two_exits(z: Tensor) -> list[Tensor]:
    return [z, (1.5 * z).sin()]


def through_head(z: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias that all depend on z."""
    hidden = [z[:, :WIDTH], z[:, 1 : 1 + WIDTH].cos()]
    return hidden, z.sin()[:3].t() @ z[:3, :WIDTH], z.sum(0)


def linear_usual(z: Tensor, y: Tensor) -> Tensor:
    hidden, weight, bias = through_head(z)
    return usual([F.linear(h, weight, bias) for h in hidden], y)


def linear_ours(z: Tensor, y: Tensor) -> Tensor:
    hidden, weight, bias = through_head(z)
    return linear_exit_cross_entropy(hidden, weight, y, bias).losses


FORMS: Forms = {
    "one matrix": (
        lambda z, y: exit_cross_entropy(two_exits(z), y).losses,
        lambda z, y: usual(two_exits(z), y),
    ),
    "a matrix each": (
        lambda z, y: exit_cross_entropy([z, z[:, :3].exp()], y).losses,
        lambda z, y: usual([z, z[:, :3].exp()], y),
    ),
    "one tensor": (
        lambda z, y: exit_cross_entropy(torch.stack(two_exits(z)), y).losses,
        lambda z, y: usual(two_exits(z), y),
    ),
    "smoothing": (
        lambda z, y: exit_cross_entropy(two_exits(z), y, label_smoothing=0.2).losses,
        lambda z, y: usual(two_exits(z), y, 0.2),
    ),
    "reference": (
        lambda z, y: exit_cross_entropy(two_exits(z), y, impl="reference").losses,
        lambda z, y: usual(two_exits(z), y),
    ),
    "linear": (linear_ours, linear_usual),
}


def loss(losses: Function) -> Function:
    """One number, nonlinear in the losses so that second orders mix with first ones."""
    return lambda z: (SCALES * losses(z)).square().sum()


def tangent(z: Tensor) -> Tensor:
    return torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)


def dual_jvp(losses: Function, z: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(losses(forward_ad.make_dual(z, tangent(z)))).tangent


def dual_backward(losses: Function, z: Tensor) -> Tensor:
    """Forward over reverse without a graph of the gradient: the backward meets dual numbers."""
    leaf = z.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, tangent(z))
        (gradient,) = torch.autograd.grad(loss(losses)(dual), leaf)
        return forward_ad.unpack_dual(gradient).tangent


def gradient(losses: Function, z: Tensor, order: int = 1) -> Tensor:
    leaf = z.clone().requires_grad_()
    value = loss(losses)(leaf)
    for _ in range(order - 1):
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = (slope * tangent(z)).sum()
    return torch.autograd.grad(value, leaf)[0]


def twice_backward(losses: Function, z: Tensor) -> Tensor:
    """The same graph with different upstream gradients: what the first used up is not missed."""
    leaf = z.clone().requires_grad_()
    values = losses(leaf)
    first = torch.autograd.grad(values, leaf, SCALES, retain_graph=True)[0]
    return torch.stack([first, torch.autograd.grad(values, leaf, SCALES.flip(0))[0]])


def batched_upstream(losses: Function, z: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    upstream = torch.stack([SCALES, SCALES.flip(0), SCALES.sin()])
    return torch.autograd.grad(losses(leaf), leaf, upstream, is_grads_batched=True)[0]


def many(z: Tensor) -> Tensor:
    return torch.stack([z, z.roll(1, 0), 2 * z])


CHECKS: dict[str, Callable[[Function, Tensor], object]] = {
    "value": lambda f, z: f(z),
    "gradient": gradient,
    "second order": lambda f, z: gradient(f, z, 2),
    "third order": lambda f, z: gradient(f, z, 3),
    "twice backward": twice_backward,
    "batched upstream": batched_upstream,
    "dual numbers": dual_jvp,
    "backward on dual numbers": dual_backward,
    "jvp": lambda f, z: func.jvp(f, (z,), (tangent(z),))[1],
    "linearize": lambda f, z: func.linearize(f, z)[1](tangent(z)),
    "jacfwd": lambda f, z: func.jacfwd(f)(z),
    "jvp of grad": lambda f, z: func.jvp(func.grad(loss(f)), (z,), (tangent(z),))[1],
    "grad of jvp": lambda f, z: func.grad(lambda x: func.jvp(loss(f), (x,), (tangent(z),))[1])(z),
    "jvp of jvp": lambda f, z: func.jvp(
        lambda x: func.jvp(f, (x,), (tangent(z),))[1], (z,), (tangent(z).cos(),)
    )[1],
    "grad": lambda f, z: func.grad(loss(f))(z),
    "vjp": lambda f, z: func.vjp(f, z)[1](SCALES)[0],
    "grad of grad": lambda f, z: func.grad(lambda x: (func.grad(loss(f))(x) * tangent(z)).sum())(z),
    "jacrev": lambda f, z: func.jacrev(f)(z),
    "hessian": lambda f, z: func.hessian(loss(f))(z),
    "vmap": lambda f, z: func.vmap(f)(many(z)),
    "vmap of grad": lambda f, z: func.vmap(func.grad(loss(f)))(many(z)),
    "vmap of jvp": lambda f, z: func.vmap(lambda x: func.jvp(f, (x,), (tangent(z),))[1])(many(z)),
    "jvp of vmap": lambda f, z: func.jvp(func.vmap(f), (many(z),), (many(tangent(z)),))[1],
    "grad of vmap": lambda f, z: func.grad(lambda x: func.vmap(loss(f))(x).sum())(many(z)),
    "vmap of vmap": lambda f, z: func.vmap(func.vmap(f))(torch.stack([many(z), many(z.cos())])),
    "compiled value": lambda f, z: compiled(f, "eager")(z),
    "compiled gradient": lambda f, z: gradient(compiled(f), z),
    "compiled grad": lambda f, z: compiled(func.grad(loss(f)))(z),
    "compiled jvp": lambda f, z: compiled(lambda x: func.jvp(f, (x,), (tangent(z),))[1])(z),
    "compiled hessian": lambda f, z: compiled(func.hessian(loss(f)), "eager")(z),
    "compiled vmap of grad": lambda f, z: compiled(func.vmap(func.grad(loss(f))))(many(z)),
}


def compiled(f: Function, backend: str = "aot_eager") -> Function:
    """What stands after tracing is traced by aot_eager a second time, to operations without views.

    The checks of first derivatives show that once; where it takes longest, "eager" runs the trace.
    """
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(NUM_SAMPLES, NUM_CLASSES, dtype=torch.float64)


# Compiled code is plain operations in every form, and so are transforms: each form is compiled as
# it is and backward, each transform of one form of either function.
OF_ALL_FORMS = [check for check in CHECKS if not check.startswith("compiled")]
GRID = [
    *((check, form) for check in OF_ALL_FORMS for form in FORMS),
    *(
        (f"compiled {check}", form)
        for check in ("value", "gradient")
        for form in FORMS
        if form != "reference"  # which the others become
    ),
    *(
        (f"compiled {check}", form)
        for check in ("grad", "jvp", "hessian", "vmap of grad")
        for form in ("one matrix", "linear")
    ),
]


@pytest.mark.parametrize(("check", "form"), GRID)
def test_equals_pytorchs_own(check: str, form: str, logits: Tensor) -> None:
    ours, theirs = FORMS[form]
    target = TARGET_OF_FEWER if form == "a matrix each" else TARGET
    oracle = CHECKS[check.removeprefix("compiled ")]  # PyTorch's own is not compiled
    # Rounding in float64, through at most three derivatives of functions of size one.
    torch.testing.assert_close(
        CHECKS[check](lambda z: ours(z, target), logits),
        oracle(lambda z: theirs(z, target), logits),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("form", FORMS)
def test_numerical_differences(form: str, logits: Tensor) -> None:
    ours, _ = FORMS[form]
    target = TARGET_OF_FEWER if form == "a matrix each" else TARGET

    def f(z: Tensor) -> Tensor:
        return ours(z, target)

    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(f, leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaf, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("form", ["one matrix", "a matrix each", "one tensor", "linear"])
def test_targets_may_be_batched(form: str, logits: Tensor) -> None:
    """Gradients per sample: the most common use of vmap."""
    ours, theirs = FORMS[form]
    targets = torch.stack([TARGET_OF_FEWER, TARGET_OF_FEWER.roll(1), TARGET_OF_FEWER.roll(2)])
    mine, other = (
        func.vmap(func.grad(lambda z, y, f=f: loss(lambda x: f(x, y))(z)), in_dims=(None, 0))(
            logits, targets
        )
        for f in (ours, theirs)
    )
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_inductor_compiles_forward_and_backward() -> None:
    torch.compiler.reset()
    exits = [torch.randn(6, 7, requires_grad=True), torch.randn(6, 9, requires_grad=True)]
    target = torch.tensor([0, -100, 2, 3, 6, 5])

    def step(*logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = exit_cross_entropy(logits, target)
        return result.losses, result.confidence, result.correct

    eager, fused = step(*exits), torch.compile(step, fullgraph=True)(*exits)
    torch.testing.assert_close(fused, eager)
    torch.testing.assert_close(
        torch.autograd.grad(fused[0].square().sum(), exits),
        torch.autograd.grad(eager[0].square().sum(), exits),
    )


def test_second_order_of_a_compiled_forward_raises(logits: Tensor) -> None:
    """A limit of torch.compile's own: it must be loud."""
    leaf = logits.requires_grad_()
    value = compiled(lambda z: exit_cross_entropy(two_exits(z), TARGET).losses.square().sum())(leaf)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(value, leaf, create_graph=True)[0].sum(), leaf)


@pytest.mark.usefixtures("sizes")
def test_logits_are_left_alone_and_may_be_used_again() -> None:
    base = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    logits = 2 * base
    before = logits.detach().clone()
    target = torch.randint(5, (6,))
    value = exit_cross_entropy([logits, logits], target).losses.sum()
    value = value + exit_cross_entropy(logits, target).losses.sum() + logits.softmax(1)[:, 0].sum()
    expected = 3 * F.cross_entropy(logits, target, reduction="sum") + logits.softmax(1)[:, 0].sum()
    ours, theirs = (torch.autograd.grad(y, base, retain_graph=True)[0] for y in (value, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits, before)


def test_the_graph_does_not_hold_the_logits() -> None:
    """What the exponentials take the place of is free to go."""
    base = torch.randn(6, 5, requires_grad=True)
    logits = base + 1
    gone = weakref.ref(logits)
    losses = exit_cross_entropy([logits, base + 2], torch.randint(5, (6,))).losses
    del logits
    gc.collect()
    assert gone() is None
    losses.sum().backward()


def test_the_profiler_sees_it_by_name() -> None:
    logits = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        exit_cross_entropy(logits, torch.randint(5, (6,)), impl="torch").losses.sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"ExitCrossEntropy", "ExitCrossEntropyBackward"} <= names


def test_the_exponentials_become_the_gradient(monkeypatch) -> None:
    """Unless the graph is kept, or a gradient has a graph that needs them."""
    seen = []
    backward = function.kernel_backward

    def spy(*arguments):
        seen.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(function, "kernel_backward", spy)
    leaf = torch.randn(4, 3, requires_grad=True)
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0]), impl="torch").losses.sum()
    losses.backward(retain_graph=True)
    losses.backward()
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0]), impl="torch").losses.sum()
    torch.autograd.grad(losses, leaf, create_graph=True)
    losses.backward()
    assert seen == [False, True, False]


def test_a_backward_that_broke_off_does_not_run_again(monkeypatch) -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    losses = exit_cross_entropy(leaf, torch.tensor([0, 1, 2, 0]), impl="torch").losses.sum()
    backward = function.kernel_backward

    def broken(*arguments):
        backward(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(function, "kernel_backward", broken)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        pytest.raises(KeyboardInterrupt),
    ):
        losses.backward()
    with pytest.raises(RuntimeError, match=r"broke off|second time|inplace"):
        losses.backward()


@pytest.mark.usefixtures("sizes")
def test_results_may_be_changed_in_place() -> None:
    leaves = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    result = exit_cross_entropy(leaves, torch.tensor([0, 1, 2, 0]))
    result.confidence.clamp_(max=0.5)
    losses = 1 * result.losses
    losses[0] = 0
    losses.sum().backward()
    assert all(z.grad[0].eq(0).all() and z.grad[1].ne(0).all() for z in leaves)


def test_exits_that_are_frozen_keep_nothing() -> None:
    exits = [torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)]
    with torch.autograd.graph.saved_tensors_hooks(sizes := Sizes(), lambda x: x):
        losses = exit_cross_entropy(exits, torch.tensor([0, 1, 2, 0]), impl="torch").losses
    assert sizes.count([4, 3]) == 1
    losses.sum().backward()


class Sizes(list):
    """Takes note of what a graph saves."""

    def __call__(self, tensor):
        self.append(list(tensor.shape))
        return tensor
