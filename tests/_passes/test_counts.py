"""Numbers of batches are right for whoever looks, and cost nothing where nobody does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reweight._passes.counts import Count
from reweight._passes.forward import ExitForward
from reweight._passes.snapshots import Beginning


class Seen(TorchDispatchMode):
    """The operations that arrive below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


LOOKS: list[Callable[[Tensor], object]] = [
    int,
    lambda count: count.item(),
    lambda count: (count + 0).item(),
    lambda count: torch.stack([count, count])[1].item(),
    lambda count: torch._foreach_add([count], 0)[0].item(),
    lambda count: torch.ops.aten.add(count, 0).item(),
    lambda count: count.detach().numpy().item(),
    lambda count: count.__deepcopy__({}).item(),
    lambda count: count.add_(torch.tensor(0)).item(),
    lambda count: count.add_(0, alpha=2).item(),
]


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_what_was_added(look) -> None:
    number = torch.tensor(5)
    count = Count.of(number)
    with Seen() as seen:
        assert count.add_(1) is count
        count.add_(2)
    assert not seen.names
    assert look(count) == 8
    count.add_(1)
    assert look(count) == 9
    assert number == 5


def test_batch_norm_reads_its_own() -> None:
    layer = nn.BatchNorm1d(3, momentum=None)  # a mean of all batches, which divides by the number
    twin, x = nn.BatchNorm1d(3, momentum=None), torch.randn(4, 3)
    layer._buffers["num_batches_tracked"] = Count.of(torch.tensor(0))
    for _ in range(2):
        layer(x), twin(x)
    assert torch.equal(layer.running_mean, twin.running_mean)


class Looking(nn.Module):
    """Has an outsider ask for the number of batches, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.looks = nn.Linear(3, 2), nn.BatchNorm1d(2), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        return y * self.norm.num_batches_tracked if self.looks else y


@pytest.mark.parametrize("looks", [True, False])
def test_a_pass_on_copies_counts_for_those_who_look_alone(looks: bool) -> None:
    model = Looking().double()
    model.looks = looks
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    forward, beginning = ExitForward(model, model, None, lambda z, _: z, None), Beginning(model)
    for _ in range(2):
        with Seen() as seen:
            losses = forward.at({}, beginning.buffers, *batch, lambda exits: exits.losses)
        assert torch.equal(
            losses,
            nn.functional.batch_norm(
                model.layer(batch[0]), None, None, model.norm.weight, model.norm.bias, training=True
            ),
        )  # the first batch, each time
        assert ("aten::add_" in seen.names) == looks
    assert model.norm.num_batches_tracked == 0
