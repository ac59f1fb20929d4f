"""What goes wrong in the first minutes: the error message alone explains it, nothing has changed.

A move to another device is imitated by new parameters, or by the device "meta".
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from properties import assert_same
from reweight import (
    BudgetedObjective,
    MeanObjective,
    MetaReweightStep,
    SampleReweighter,
    swap_halves,
)

NUM_SAMPLES, WIDTH, NUM_CLASSES = 8, 5, 4
Batch = tuple[Any, Any]


class Net(nn.Module):
    def __init__(self, num_exits: int = 3, output: Callable[[list[Tensor]], Any] = list) -> None:
        super().__init__()
        self.body, self.output = nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6)), output
        self.exits = nn.ModuleList(nn.Linear(6, NUM_CLASSES) for _ in range(num_exits))

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).tanh()
        return self.output([exit(x) for exit in self.exits])


def batch(num_samples: int = NUM_SAMPLES) -> Batch:
    return torch.randn(num_samples, WIDTH), torch.randint(NUM_CLASSES, (num_samples,))


def make(model: Any = None, **options: Any) -> MetaReweightStep:
    """A step in whose optimizer there is momentum already."""
    model = model or Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.body(batch()[0]).sum().backward()
    optimizer.step()
    reweighter = options.pop("reweighter", None) or SampleReweighter(3)
    return MetaReweightStep(model, optimizer, reweighter, **options)


def with_new_parameters(model: nn.Module) -> nn.Module:
    """As ``.to`` does where it cannot move them in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return model


X, Y = batch()
GOOD = (X, Y)


def each_loss(outputs: list[Tensor], target: Tensor) -> list[Tensor]:
    return [F.cross_entropy(z, target, reduction="none") for z in outputs]


# What is given for train and meta → what is said.
BATCHES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a tensor": (X, GOOD, TypeError, r"`train` must be a pair \(inputs, target\), got Tensor"),
    "inputs and target apart": (X, Y, TypeError, r"`train` must be a pair \(inputs, target\)"),
    "no target": ((X,), GOOD, TypeError, r"`train` must be a pair .* got a tuple of 1"),
    "no meta target": (GOOD, [X], TypeError, r"`meta` must be a pair .* got a list of 1"),
    "a dict": ({"x": X}, GOOD, TypeError, r"got dict\. Take the target out of the dict: \(batch, "),
    "three values": ((X, X, Y), GOOD, TypeError, r"got a tuple of 3\. Several inputs go into a"),
    "no meta batch": (GOOD, None, TypeError, r"`meta` must be a pair .* unless lagged=True"),
    "target of None": ((X, None), GOOD, TypeError, "`target` must hold class indices .* NoneType"),
    "float target": ((X, Y.float()), GOOD, TypeError, r"int64 tensor.*torch.float32, shape \[8\]"),
    "int32 target": ((X, Y.int()), GOOD, TypeError, "`target` must .* int64 .* torch.int32"),
    "column target": ((X, Y[:, None]), GOOD, ValueError, r"target\.squeeze\(-1\) of a column"),
    "one-hot target": ((X, F.one_hot(Y)), GOOD, ValueError, r"target\.argmax\(-1\)"),
    "target beyond": ((X, Y + 4), GOOD, ValueError, r"`target` must lie in 0\.\.3.*got [4-7]"),
    "meta target below": (GOOD, (X, Y - 9), ValueError, r"`target` must lie in 0\.\.3.*got -"),
    "fewer targets": ((X, Y[:5]), GOOD, ValueError, r"\[5, 'C'\], got \[8, 4\].*the same batch"),
    "empty": ((X[:0], Y[:0]), GOOD, ValueError, "`train` must hold at least one sample"),
    "meta empty": (GOOD, (X[:0], Y[:0]), ValueError, "`meta` must hold at least one sample"),
}


def state(step: MetaReweightStep) -> list[object]:
    """All that a call may change, copied."""
    model, optimizer = step.model, step.optimizers[0]
    own = step.reweighter_optimizer
    return copy.deepcopy(
        [
            model.state_dict(),
            [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()],
            optimizer.state_dict(),
            step.state_dict(),
            own.state_dict() if own else None,
            torch.get_rng_state(),
        ]
    )


def refused(
    step: MetaReweightStep, train: Any, meta: Any, call: str, error: type[Exception], words: str
) -> Exception:
    before = state(step)
    with pytest.raises(error, match=words) as raised:
        getattr(step, call)(train, meta)
    assert_same(state(step), before)
    cause = raised.value.__cause__ or raised.value.__context__
    assert cause is None, "one error, not one on top of another"
    return raised.value


CALLS = ["__call__", "backward", "update_reweighter"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch(name: str, call: str) -> None:
    train, meta, error, words = BATCHES[name]
    if (name, call) == ("no meta batch", "update_reweighter"):
        words = r"`meta` must be a pair \(inputs, target\), got NoneType"
    refused(make(), train, meta, call, error, words)


# Errors of the model itself, which PyTorch words: the note says with what it was called.
INPUTS: dict[str, tuple[Any, Any, str]] = {
    "too wide": ((torch.randn(8, 7), Y), GOOD, r"torch.float32 \[8, 7\] on cpu"),
    "meta too wide": (GOOD, (torch.randn(6, 7), Y), r"torch.float32 \[6, 7\] on cpu"),
    "swapped": ((Y, X), GOOD, r"batch \(inputs, target\): torch.int64 \[8\] on cpu"),
    "meta swapped": (GOOD, (Y[:7], X), r"batch \(inputs, target\): torch.int64 \[7\] on cpu"),
    "integers": ((torch.ones(8, 5).long(), Y), GOOD, r"torch.int64 \[8, 5\]"),
    "double": ((X.double(), Y), GOOD, r"torch.float64 \[8, 5\]"),
    "two batches": (
        (GOOD, GOOD),
        GOOD,
        r"a tuple of 2: torch.float32 \[8, 5\] on cpu, torch.int64",
    ),
    "named otherwise": (({"y": X}, Y), GOOD, r"a dict\(y=torch.float32 \[8, 5\] on cpu\)"),
    "elsewhere": ((X.to("meta"), Y), GOOD, r"torch.float32 \[8, 5\] on meta"),
    "None": ((None, Y), GOOD, r": NoneType"),
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes yet")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_the_model_refuses(name: str, call: str) -> None:
    train, meta, words = INPUTS[name]
    error = refused(make(), train, meta, call, Exception, words)
    assert error.__notes__[1:] == [
        "This was at the `meta` batch, in the look-ahead."
    ] * name.startswith("meta")


# A model, loss or reweighter that does not fit → what the first call says.
PARTS: dict[str, tuple[Callable[[], MetaReweightStep], type[Exception], str]] = {
    "an exit missing": (
        lambda: make(Net(num_exits=2)),
        ValueError,
        r"num_exits=3\], got \[8, 2\]. Build SampleReweighter with as many exits as the model has",
    ),
    "an exit too many": (lambda: make(Net(num_exits=4)), ValueError, r"num_exits=3\], got \[8, 4"),
    "one exit alone": (
        lambda: make(Net(output=lambda logits: logits[0])),
        ValueError,
        r"num_exits=3\], got \[8, 1\]",
    ),
    "another reweighter": (
        lambda: make(reweighter=SampleReweighter(4)),
        ValueError,
        r"num_exits=4\], got \[8, 3\]",
    ),
    "a dict returned": (
        lambda: make(Net(output=lambda logits: {"logits": logits})),
        TypeError,
        r"non-empty list.* got a dict\(logits=a list of 3: torch.float32 \[8.*Pass `exits=`",
    ),
    "nothing returned": (
        lambda: make(Net(output=lambda logits: None)),
        TypeError,
        "`logits` must be a tensor .* got NoneType",
    ),
    "an exit missing in the list": (
        lambda: make(Net(output=lambda logits: [None, *logits[1:]])),
        TypeError,
        "got a list of 3: NoneType, torch.float32",
    ),
    "one class": (
        lambda: make(Net(output=lambda logits: [z[:, :1] for z in logits])),
        ValueError,
        r"`logits` of exit 1 must be of two classes or more, got \[8, 1\]",
    ),
    "means returned": (
        lambda: make(Net(output=lambda logits: [z.mean(0) for z in logits])),
        ValueError,
        r"`logits` of exit 1 must have the samples of the target first.*got \[4\]",
    ),
    "a graph cut": (
        lambda: make(Net(output=lambda logits: [z.detach() for z in logits])),
        ValueError,
        "must return logits that depend on a trainable parameter",
    ),
    "losses of one exit": (
        lambda: make(loss=lambda z, y: each_loss(z, y)[0], objective=MeanObjective()),
        ValueError,
        r"`loss` must return losses of shape \[samples, exits\].*got \[8\]",
    ),
    "a mean loss": (
        lambda: make(loss=lambda z, y: each_loss(z, y)[0].mean(), objective=MeanObjective()),
        ValueError,
        r"one row for each sample, got \[\]. Do not average over the samples",
    ),
    "losses transposed": (
        lambda: make(loss=lambda z, y: torch.stack(each_loss(z, y)), objective=MeanObjective()),
        ValueError,
        r"got \[3, 8\].* let `loss` return a row for each sample and a column for each exit",
    ),
    "a list of losses": (lambda: make(loss=each_loss), TypeError, r"\[samples, exits\], got list"),
    "no confidences": (
        lambda: make(loss=lambda z, y: torch.stack(each_loss(z, y), 1)),
        ValueError,
        r"`loss` must return ExitLosses with confidences .* or use MeanObjective\(\)",
    ),
    "a bare meta loss": (
        lambda: make(objective=lambda meta: meta.losses.mean()),
        TypeError,
        r"`objective` must return MetaLoss\(value, shares\), got Tensor",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_fit(name: str) -> None:
    step, error, words = PARTS[name][0](), *PARTS[name][1:]
    refused(step, GOOD, batch(), "__call__", error, words)


def later(change: Callable[[nn.Module], Any]) -> MetaReweightStep:
    step = make()
    change(step.model)
    return step


@pytest.mark.parametrize(
    "change",
    [with_new_parameters, lambda model: model.requires_grad_(False)],
    ids=["moved", "frozen"],
)
def test_a_model_that_changes_under_its_step(change: Callable[[nn.Module], Any]) -> None:
    refused(
        later(change), GOOD, batch(), "__call__", ValueError, "first, then create the optimizer"
    )


def without_gradients() -> None:
    step = make()
    with torch.no_grad():
        step(GOOD, GOOD)


def frozen() -> None:
    model = Net().requires_grad_(False)
    MetaReweightStep(model, optimizer_of(model), SampleReweighter(3))


def optimizer_of(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def moved_after_its_optimizer(move: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    optimizer = optimizer_of(model)
    MetaReweightStep(move(model), optimizer, SampleReweighter(3))


HELD_BY_NONE = "`optimizer` must hold parameters of `model`.* after moving the model to its device"
SETUPS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "moved after its optimizer": (
        lambda: moved_after_its_optimizer(with_new_parameters),
        ValueError,
        HELD_BY_NONE,
    ),
    "moved to another device": (
        lambda: moved_after_its_optimizer(lambda model: model.to("meta")),
        ValueError,
        HELD_BY_NONE,
    ),
    "another model's optimizer": (
        lambda: MetaReweightStep(Net(), optimizer_of(Net()), SampleReweighter(3)),
        ValueError,
        HELD_BY_NONE,
    ),
    "parameters for an optimizer": (
        lambda: MetaReweightStep(Net(), Net().parameters(), SampleReweighter(3)),
        TypeError,
        "`optimizer` must be an optimizer of torch.optim or torchopt.* got generator",
    ),
    "swapped": (
        lambda: MetaReweightStep(Net(), SampleReweighter(3), optimizer_of(Net())),
        TypeError,
        "`optimizer` must be an optimizer .* got SampleReweighter",
    ),
    "a frozen model": (
        frozen,
        ValueError,
        "`model` must have a trainable parameter, got none",
    ),
    "a function for a model": (
        lambda: MetaReweightStep(Net.forward, optimizer_of(Net()), SampleReweighter(3)),
        TypeError,
        r"`model` must be a torch\.nn\.Module, got function",
    ),
    "a number for a reweighter": (
        lambda: make(reweighter=3),
        TypeError,
        r"`reweighter` must be a module such as SampleReweighter\(num_exits=3\), got 3",
    ),
    "a class for a reweighter": (
        lambda: make(reweighter=SampleReweighter),
        TypeError,
        "`reweighter` must be a module .*, got the class SampleReweighter",
    ),
    "a class for an objective": (
        lambda: make(objective=BudgetedObjective),
        TypeError,
        r"got the class BudgetedObjective\. Pass an instance: BudgetedObjective\(\)",
    ),
    "text for a number": (
        lambda: SampleReweighter("3"),
        TypeError,
        "`num_exits` must be a whole number, got '3'",
    ),
    "a fraction of an exit": (
        lambda: SampleReweighter(2.5),
        TypeError,
        r"`num_exits` must be a whole number, got 2\.5",
    ),
    "no interval": (lambda: make(interval=0), ValueError, "`interval` must be at least 1, got 0"),
    **{
        f"{name}={value!r}": (lambda n=name, v=value: make(**{n: v}), error, words)
        for name, value, error, words in (
            ("interval", 1.5, TypeError, r"`interval` must be a whole number, got 1\.5"),
            ("interval", None, TypeError, "`interval` must be a whole number, got None"),
            ("lagged", "False", TypeError, "`lagged` must be True or False, got 'False'"),
            ("lean", 1, TypeError, "`lean` must be True or False, got 1"),
            ("objective", "budgeted", TypeError, "`objective` must be a function, .* 'budgeted'"),
            ("loss", "ce", TypeError, "`loss` must be a function, .* got 'ce'"),
            ("loss", nn.CrossEntropyLoss, TypeError, r"an instance: CrossEntropyLoss\(\)"),
            ("exits", 3, TypeError, "`exits` must be a function, .* got 3"),
            ("moves", "exits", TypeError, "`moves` must be a function, .* got 'exits'"),
            ("scaler", True, TypeError, "`scaler` must be a GradScaler, got bool"),
            ("reweighter_optimizer", 1e-3, TypeError, r"`reweighter_optimizer` .* got float\."),
            ("reweighter_optimizer", Adam, TypeError, "`reweighter_optimizer` .* the class Adam"),
            ("train_fraction", "a", TypeError, "`train_fraction` must be a number, got 'a'"),
            ("clip_grad_norm", "1", TypeError, "`clip_grad_norm` must be a number, got '1'"),
            ("clip_grad_norm", -1, ValueError, "`clip_grad_norm` must be positive, got -1"),
            ("clip_hypergradient", 0, ValueError, "`clip_hypergradient` must be positive, got 0"),
        )
    },
    "a class for an optimizer": (
        lambda: MetaReweightStep(Net(), SGD, SampleReweighter(3)),
        TypeError,
        "`optimizer` must be an optimizer .* got the class SGD",
    ),
    "a scheduler for an optimizer": (
        lambda: MetaReweightStep(
            Net(), torch.optim.lr_scheduler.StepLR(optimizer_of(Net()), 1), SampleReweighter(3)
        ),
        TypeError,
        r"`optimizer` must be an optimizer .* got StepLR\. Pass its `optimizer`",
    ),
    "a class for a model": (
        lambda: MetaReweightStep(Net, optimizer_of(Net()), SampleReweighter(3)),
        TypeError,
        r"`model` must be a torch\.nn\.Module, got the class Net\.$",
    ),
    "a strength of a sigmoid": (
        lambda: SampleReweighter(3, form="sigmoid", strength=0.5),
        ValueError,
        "`strength` must be 0, for weights of 1, or left out of form='sigmoid', got 0.5: it is of",
    ),
    "a text for a power": (
        lambda: BudgetedObjective("a"),
        TypeError,
        "`power` must be a number, got 'a'",
    ),
    "a scale for each sample": (
        lambda: make().backward(GOOD, GOOD, scale=torch.ones(4)),
        ValueError,
        r"`scale` must be one number, got a tensor \[4\]",
    ),
    "no scale": (
        lambda: make().backward(GOOD, GOOD, scale=0),
        ValueError,
        "`scale` must be positive, got 0",
    ),
    "no gradients": (
        without_gradients,
        ValueError,
        "losses without a graph. Are all parameters frozen, or gradients switched off",
    ),
    "a batch for a loader": (
        lambda: list(swap_halves(GOOD)),
        TypeError,
        r"the batch of `loader` must be a pair \(inputs, target\), got Tensor",
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_wrong_setup(name: str) -> None:
    call, error, words = SETUPS[name]
    with pytest.raises(error, match=words) as raised:
        call()
    assert (raised.value.__cause__ or raised.value.__context__) is None


def test_steps_that_never_come_are_told_where_nothing_can_be_learned() -> None:
    """Without them Adam has no state; elsewhere, as in any loop, gradients just add up."""
    model = Net()
    step = MetaReweightStep(model, Adam(model.parameters()), SampleReweighter(3))
    step.backward(GOOD, batch())
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"Call optimizer\.step\(\) after each call"):
        step.backward(GOOD, batch())


@pytest.mark.parametrize("call", CALLS[1:])
def test_a_call_after_a_failure_is_as_if_there_was_none(call: str) -> None:
    steps = []
    for fails in (False, True):
        torch.manual_seed(0)
        step = make()
        if fails:
            refused(step, (X, Y + 4), GOOD, call, ValueError, "must lie in")
        getattr(step, call)(GOOD, batch())
        steps.append(state(step))
    assert_same(*steps)


def test_a_model_in_evaluation_mode_trains_as_in_a_plain_loop() -> None:
    """As one does to fine-tune with fixed statistics, so this is no error."""
    model = Net()
    with torch.no_grad():
        model(X)
    twin = copy.deepcopy(model.eval())
    optimizers = [SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    step = MetaReweightStep(model, optimizers[0], SampleReweighter(3, strength=0))
    step(GOOD, batch())
    torch.stack([F.cross_entropy(z, Y) for z in twin(X)]).sum().backward()
    optimizers[1].step()
    for name, value in twin.state_dict().items():
        # The means are taken over another number of terms at a time.
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_what_an_optimizer_leaves_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, other = Net(), nn.Linear(2, 2)
    held = [*model.body.parameters(), *other.parameters()]
    MetaReweightStep(model, SGD(held, lr=0.1), SampleReweighter(3))
    left, others = caplog.messages
    assert "all trainable parameters of `model` but 6" in left
    assert "exits.0.weight, exits.0.bias, exits.1.weight, …" in left
    assert "holds 2 parameters that are not of `model`" in others
    caplog.clear()
    make()
    assert not caplog.messages
