"""No wait for the device between `step.backward` and its return, after the first update.

Everything lives on PyTorch's meta device, where tensors have shapes and no values: whatever asks
for one (`item`, `bool`, `nonzero`, `equal`, a mask as index, a copy to the CPU) raises an error
that names it. It is no CPU, so no shortcut for CPUs is taken. Copies to the device wait as well,
if nobody says otherwise, and are looked for by two modes.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reweight import MetaReweightStep, SampleReweighter

META = torch.device("meta")
NUM_EXITS, NUM_CLASSES = 3, 5


def is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


class NoCopies(TorchDispatchMode):
    """Refuses a copy from the CPU that waits, and what makes one of its own of an argument."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            assert not (waits and is_on_device(result) and not is_on_device(source)), func
        elif any(map(is_on_device, tensors)):  # numbers go along with a launch, more does not
            assert all(is_on_device(t) or not t.dim() for t in tensors), func
        return result


class NoLiterals(TorchFunctionMode):
    """Refuses a tensor on the device that is made of Python's numbers: a copy as well."""

    MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = func in self.MAKERS and not is_on_device(args[0] if args else None)
        assert not (made and is_on_device(result)), func
        if func is Tensor.__getitem__ and is_on_device(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(each, list) for each in index), "a list as index"
        return result


class Net(nn.Module):
    """A convolution, BatchNorm, dropout, attention, and an exit after each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))
        self.heads = nn.ModuleList(nn.Linear(8, NUM_CLASSES) for _ in range(NUM_EXITS))

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        hidden = [tokens, self.attention(tokens, tokens, tokens)[0]]
        hidden.append(self.mlp(hidden[1]))
        return [head(h.mean(1)) for head, h in zip(self.heads, hidden, strict=True)]


def batch() -> tuple[Tensor, Tensor]:
    return torch.empty(8, 1, 4, 4, device=META), torch.empty(8, dtype=torch.int64, device=META)


def warm_up(optimizer: torch.optim.Optimizer) -> None:
    """As after the first update: there is state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def make(optimizer_class=torch.optim.AdamW, form="tanh", **options) -> MetaReweightStep:
    with META:
        model, reweighter = Net(), SampleReweighter(NUM_EXITS, form=form)
    momentum = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.1, **momentum)
    step = MetaReweightStep(model, optimizer, reweighter, **options)
    warm_up(optimizer)
    warm_up(step.reweighter_optimizer)
    state = step.state_dict()
    step.load_state_dict(state | {"num_skipped": state["num_skipped"].to(META)})
    return step


class Agreement:
    """In the place of the one number that is read: an update later, from a copy under way."""

    def __init__(self, number: Tensor) -> None:
        assert is_on_device(number)

    def read(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch) -> None:
    """What the meta device lacks, and what a step does only at its construction."""
    monkeypatch.setattr("reweight._meta.learner.require_same", lambda *args: None)
    monkeypatch.setattr("reweight._meta.consistency.Later", Agreement)
    for name, instead in (
        ("is_autocast_enabled", False),
        ("get_autocast_dtype", torch.bfloat16),
        ("autocast", nullcontext()),
    ):
        known = getattr(torch, name)

        def ask(*args, known=known, instead=instead):
            return instead if args[:1] == ("meta",) else known(*args)

        monkeypatch.setattr(torch, name, ask)


KINDS = {
    "exact": {},
    "SGD": {"optimizer_class": torch.optim.SGD},
    "Adam": {"optimizer_class": torch.optim.Adam},
    "lean": {"lean": True},
    "lagged": {"lagged": True},
    "lean and lagged": {"lean": True, "lagged": True},
    "a fraction of the samples": {"train_fraction": 0.5},
    "every other call": {"interval": 2},
    "some parameters": {"moves": lambda name: "heads" in name},
    "clipped": {"clip_grad_norm": 1.0, "clip_hypergradient": 1.0},
    "sigmoid": {"form": "sigmoid"},
    "finite differences": {"estimator": "finite_difference"},
    "unrolled": {"estimator": "unrolled"},
    "gradient descent": {"pseudo_update": "gradient_descent"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_for_no_value(kind) -> None:
    step = make(**KINDS[kind])
    estimator = step.estimator
    for _ in range(2):  # the second meets what the first has left
        train, meta = batch(), batch()
        with NoLiterals(), NoCopies():
            result = step.backward(train, meta)
        assert all(is_on_device(p.grad) for p in step.model.parameters())
        warm_up(step.optimizers[0])
    assert is_on_device(result.weights)
    assert (step.estimator, step._estimator.ladder.told) == (estimator, {})
    assert step._learner.num_updates == (1 if kind == "every other call" else 2)
