"""What PyTorch would compile or checkpoint, as plain code: the same values and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reweight._passes.eager import as_written


def gradients(run, *tensors: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    result = run()
    return [result.detach(), *torch.autograd.grad(result.sum(), tensors)]


@pytest.mark.parametrize("sign", [1, -1])
def test_cond_takes_its_branch(sign: int) -> None:
    x = torch.full((3,), 0.3, requires_grad=True)
    with as_written():
        found = gradients(lambda: torch.cond(sign * x.sum() > 0, torch.sin, torch.cos, (x,)), x)
    assert all(map(torch.equal, found, gradients(lambda: (x.sin if sign > 0 else x.cos)(), x)))


def test_reentrant_checkpointing_has_gradients_of_chosen_inputs() -> None:
    body, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), torch.randn(4, 3, requires_grad=True)
    with as_written():
        found = gradients(lambda: checkpoint(body, x, use_reentrant=True), x, *body.parameters())
    assert all(map(torch.equal, found, gradients(lambda: body(x), x, *body.parameters())))


def test_reentrant_checkpointing_needs_an_input_with_a_gradient() -> None:
    body, x = nn.Linear(3, 3), torch.randn(4, 3)
    with as_written():
        assert not checkpoint(body, x, use_reentrant=True).requires_grad


def test_nothing_of_it_stays() -> None:
    names = torch.utils.checkpoint.CheckpointFunction, torch._higher_order_ops.cond
    with pytest.raises(ValueError, match="broken"), as_written():
        raise ValueError("broken")
    assert names == (torch.utils.checkpoint.CheckpointFunction, torch._higher_order_ops.cond)
