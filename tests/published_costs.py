"""Costs by the convention of the published MSDNet and RANet figures."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from staged import StagedNet

# The published convention, for a counter of which two operations are one multiply-add.
PUBLISHED_EXTRAS = {
    torch.ops.aten.relu: lambda x, *_, **__: 2 * math.prod(x),
    torch.ops.aten.avg_pool2d: lambda x, *_, **__: 2 * math.prod(x),
}


def multiply_adds(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Cost of one module by the published convention, in which ReLU and pooling count too."""
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * output[0, 0].numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel() + module.bias.numel()
    if isinstance(module, nn.ReLU):
        return output.numel()
    if isinstance(module, nn.AvgPool2d):
        return inputs.numel()  # the windows neither overlap nor leave anything out
    assert isinstance(module, nn.BatchNorm2d | nn.Flatten | nn.Identity), (
        "counts for nothing by convention"
    )
    return 0


def cumulated_costs(model: StagedNet, images: Tensor) -> tuple[list[int], list[int]]:
    """Multiply-adds and parameters of everything that ran before each exit's logits came."""
    cost = size = 0
    costs, sizes = [], []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal cost, size
        cost += multiply_adds(module, inputs[0], output)
        size += sum(parameter.numel() for parameter in module.parameters())

    def record(*_: Any) -> None:
        costs.append(cost)
        sizes.append(size)

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(count)
    for classifier in model.exits:
        classifier.register_forward_hook(record)
    with torch.no_grad():
        model.eval()(images)
    return costs, sizes


def in_millions(numbers: list[int]) -> str:
    return " ".join(f"{number / 1e6:.2f}" for number in numbers)
