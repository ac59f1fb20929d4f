"""Two small multi-exit nets for small images: a perceptron and a plain convolutional net."""

import math
from itertools import pairwise

from torch import Tensor, nn


class MultiExitMLP(nn.Module):
    """Fully connected layers in a row, each with an exit.

    Args:
        input_shape: shape of one input; flattened.
        num_classes: C.
        num_exits: K, as many as there are hidden layers.
        width: of each hidden layer.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_exits: int = 4, width: int = 32
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape)] + [width] * num_exits
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)
        )
        self.exits = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(num_exits))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, ...] → K logits [B, C], computed exit by exit."""
        x = x.flatten(1)
        logits = []
        for block, exit in zip(self.blocks, self.exits, strict=True):
            x = block(x)
            logits.append(exit(x))
        return logits


class MultiExitConvNet(nn.Module):
    """3×3 convolutions with BatchNorm in a row, an exit after each pair.

    The resolution is halved after the first pair and again halfway through the rest, and the width
    doubled each time.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: C.
        num_exits: K, as many as there are pairs of convolutions.
        width: channels of the first pair.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_exits: int = 5, width: int = 16
    ) -> None:
        super().__init__()
        channels = input_shape[0]
        blocks: list[nn.Module] = []
        exits: list[nn.Module] = []
        for k in range(num_exits):
            halve = k in (1, (num_exits + 1) // 2)
            width = 2 * width if halve else width
            blocks.append(
                nn.Sequential(_conv(channels, width, stride=2 if halve else 1), _conv(width, width))
            )
            exits.append(
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
            )
            channels = width
        self.blocks, self.exits = nn.ModuleList(blocks), nn.ModuleList(exits)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, channels, H, W] → K logits [B, C], computed exit by exit."""
        logits = []
        for block, exit in zip(self.blocks, self.exits, strict=True):
            x = block(x)
            logits.append(exit(x))
        return logits


def _conv(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )
