"""step.check tells what there is to know, and changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from cases import OPTIMIZERS, Double, HalvedBackward, make_batch, make_model, warmed
from reweight import DirectWeights, MetaReweightStep, SampleReweighter, StepCheck


def make_step(name: str = "mlp", optimizer: str = "adamw", **options) -> MetaReweightStep:
    model, its_optimizer = warmed(name, OPTIMIZERS[optimizer])
    reweighter = options.pop("reweighter", None) or SampleReweighter(3, num_hidden=4).double()
    return MetaReweightStep(model, its_optimizer, reweighter, **options)


def check(step: MetaReweightStep, name: str = "mlp") -> StepCheck:
    return step.check(make_batch(name, 8, seed=1), make_batch(name, 8, seed=2))


def run(name: str, optimizer: str, checked: bool, **options) -> dict[str, Tensor]:
    """What two steps leave behind, with a look in between or without one."""
    step = make_step(name, optimizer, **options)
    found = {}
    for index in range(2):
        step.model.zero_grad()
        step.backward(make_batch(name, seed=3), make_batch(name, seed=4))
        if checked and index == 0:
            check(step, name)
        step.optimizers[0].step()
    found |= {f"model {n}": t for n, t in step.model.state_dict().items()}
    found |= {f"gradient {n}": p.grad for n, p in step.model.named_parameters()}
    found |= {f"g {n}": t for n, t in step.reweighter.state_dict().items()}
    found["calls"] = torch.tensor(step.state_dict()["num_calls"])
    return found | {"random state": torch.get_rng_state()}


@pytest.mark.parametrize(
    "options", [{}, {"interval": 2}, {"lean": True}, {"lagged": True}], ids=str
)
@pytest.mark.parametrize("name", ["conv_batch_norm", "transformer_dropout"])
def test_training_goes_on_as_if_nobody_had_looked(name, options) -> None:
    looked, undisturbed = (run(name, "adamw", checked, **options) for checked in (True, False))
    for key, value in undisturbed.items():
        assert value is None or torch.equal(looked[key], value), key


def test_it_says_what_goes_on() -> None:
    found = check(make_step(interval=10))
    assert found.estimator == "auto"
    assert found.operations == {}
    assert found.optimizers == ["AdamW: in closed form"]
    assert found.backward_difference is not None
    assert found.backward_difference < 1e-10
    assert found.hooks == found.messages == []
    assert found.memory is None
    plain, step = found.seconds
    assert found.cost == pytest.approx((step + 9 * plain) / (10 * plain))
    lines = str(found).splitlines()
    assert lines[0].split(maxsplit=1) == ["hypergradient", "exact, by forward mode"]
    assert "at interval=10" in str(found)


def test_it_names_operations_optimizers_hooks_and_warnings() -> None:
    model = make_model("mlp")
    for block, function in zip(model.blocks, (HalvedBackward, Double), strict=False):
        block.append(nn.Identity())
        block[-1].forward = function.apply
    model.exits[0].weight.register_hook(lambda gradient: gradient)
    optimizer = type("Own", (SGD,), {})(model.parameters(), lr=0.1)
    step = MetaReweightStep(model, optimizer, SampleReweighter(3, num_hidden=4).double())
    found = check(step)
    assert any("cases.Double" in name for name in found.operations), found.operations
    assert found.optimizers == ["Own: its own step, recorded and verified"]
    assert found.hooks == ["parameter exits.0.weight"]
    assert any("do not agree with the backward" in message for message in found.messages)
    assert found.backward_difference > 0.01
    assert "warning" in str(found)


def test_the_approximations_are_called_so() -> None:
    found = check(make_step(estimator="finite_difference", pseudo_update="gradient_descent"))
    assert "approximate" in str(found).splitlines()[0]
    assert found.optimizers == ["AdamW: a plain gradient step in its place, approximate"]


def test_the_signal_is_one_where_both_halves_ask_for_the_same() -> None:
    step = make_step()
    train, (inputs, target) = make_batch("mlp", 8, seed=1), make_batch("mlp", 4, seed=2)
    twice = inputs.repeat_interleave(2, 0), target.repeat_interleave(2)
    assert step.check(train, twice).signal == pytest.approx(1)
    assert step.check(train, make_batch("mlp", 8, seed=2)).signal < 0.999
    assert step.check(train, make_batch("mlp", 1, seed=2)).signal is None


def test_no_signal_where_the_step_moves_nothing() -> None:
    step = make_step()
    for group in step.optimizers[0].param_groups:
        group["lr"] = 0.0
    found = step.check(make_batch("mlp", 8, seed=1), make_batch("mlp", 8, seed=2))
    assert found.signal == 0
    assert "none: the hypergradient is 0. Is the optimizer's learning rate 0?" in str(found)


def test_direct_weights_are_looked_at_too() -> None:
    found = check(make_step(optimizer="sgd", reweighter=DirectWeights(3)))
    assert found.signal is not None
    assert found.cost > 0


def test_errors_are_those_of_a_step_and_change_nothing() -> None:
    step = make_step()
    before = copy.deepcopy(step.state_dict())
    with pytest.raises(TypeError, match="`meta` must be a pair"):
        step.check(make_batch("mlp"), None)
    assert str(step.state_dict()) == str(before)
