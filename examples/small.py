"""Two small multi-exit nets for small images: a perceptron and a plain convolutional net."""

import math
from itertools import pairwise

from torch import Tensor, nn

from convolutions import conv
from staged import StagedNet


class MultiExitMLP(StagedNet):
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

    def advance(self, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, ...], later hidden units [B, width]; the exit reads what goes on."""
        features = self.blocks[k](state.flatten(1))
        return features, features


class MultiExitConvNet(StagedNet):
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
                nn.Sequential(conv(channels, width, 3, 2 if halve else 1), conv(width, width, 3))
            )
            exits.append(
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
            )
            channels = width
        self.blocks, self.exits = nn.ModuleList(blocks), nn.ModuleList(exits)

    def advance(self, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, channels, H, W], later feature maps; the exit reads what goes on."""
        features = self.blocks[k](state)
        return features, features
