"""MSDNet for small images: dense features at several scales, an exit after every block.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018.
The defaults are its smallest CIFAR network for budgeted batches.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convolutions import BaseFeatures, bottleneck, check_image_size, conv, image_exit, initialize
from staged import StagedNet

__all__ = ["MSDNet"]


class _DenseLayer(nn.Module):
    """Append `growths[s]` channels to every scale, half of them computed from the next finer one.

    The finest scale has none finer and grows from itself alone. With `drop_finest` it is read for
    the last time and not returned.
    """

    def __init__(
        self,
        channels: Sequence[int],
        growths: Sequence[int],
        bottleneck_factors: Sequence[int],
        drop_finest: bool,
    ) -> None:
        super().__init__()
        self.same = nn.ModuleList()
        self.down = nn.ModuleList()
        if not drop_finest:
            self.same.append(bottleneck(channels[0], growths[0], bottleneck_factors[0]))
        for scale in range(1, len(channels)):
            finer = scale - 1
            half = growths[scale] // 2
            self.down.append(bottleneck(channels[finer], half, bottleneck_factors[finer], stride=2))
            self.same.append(
                bottleneck(channels[scale], growths[scale] - half, bottleneck_factors[scale])
            )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        kept = features[-len(self.same) :]
        parts = [[x, layer(x)] for x, layer in zip(kept, self.same, strict=True)]
        # One strided conv for each scale but the finest of the input, so both lists end alike.
        for number, layer in enumerate(self.down):
            parts[number - len(self.down)].append(layer(features[number]))
        return [torch.cat(part, dim=1) for part in parts]


class _Transition(nn.Module):
    """Change the number of channels of every scale by a 1x1 convolution."""

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            conv(source, target, 1)
            for source, target in zip(in_channels, out_channels, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.scales, features, strict=True)]


class MSDNet(StagedNet):
    """Multi-scale dense network with `num_exits` classifiers.

    As published, a very small network (of 1, 2 or 4 layers at three scales) still computes finer
    scales in its last layer, which no exit reads: their parameters get no gradient.

    Args:
        num_classes: Classes C of every exit.
        num_exits: Exits K, one after each block.
        in_channels: Channels of the image.
        channels: Channels of the first layer, times the scale's growth factor.
        growth: Channels each layer adds, times the scale's growth factor.
        growth_factors: One for each scale, finest first.
        bottleneck_factors: Widest bottleneck for each scale, in multiples of what its 3x3
            convolution puts out.
        base: Layers of the first block.
        step: Layers of the later blocks: `step` each where `spacing` is "even"; where it is
            "lin_grow", `step + 1` in the second, `2 * step + 1` in the third, and so on.
        spacing: "lin_grow" or "even".
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_exits: int = 5,
        in_channels: int = 3,
        channels: int = 16,
        growth: int = 6,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck_factors: Sequence[int] = (1, 2, 4),
        base: int = 1,
        step: int = 1,
        spacing: Literal["lin_grow", "even"] = "lin_grow",
    ) -> None:
        super().__init__()
        num_scales = len(growth_factors)
        counts = {
            "num_classes": num_classes,
            "num_exits": num_exits,
            "in_channels": in_channels,
            "channels": channels,
            "growth": growth,
            "base": base,
            "step": step,
            "the number of growth_factors": num_scales,
            "the smallest of growth_factors": min(growth_factors, default=1),
            "the smallest of bottleneck_factors": min(bottleneck_factors, default=1),
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if len(bottleneck_factors) != num_scales:
            raise ValueError(
                f"bottleneck_factors must have one entry for each of the {num_scales} "
                f"growth_factors, got {len(bottleneck_factors)}"
            )
        if spacing not in ("lin_grow", "even"):
            raise ValueError(f'spacing must be "lin_grow" or "even", got {spacing!r}')

        later = [step * k + 1 if spacing == "lin_grow" else step for k in range(1, num_exits)]
        block_sizes = [base, *later]
        self.max_image_size = 2 ** (num_scales + 2)
        layers_per_scale = math.ceil(sum(block_sizes) / num_scales)
        width, finest, num_layers = channels, 0, 0  # width: channels where the factor is 1

        def widths() -> list[int]:
            return [width * factor for factor in growth_factors[finest:]]

        self.blocks = nn.ModuleList()
        self.exits = nn.ModuleList()
        for block_size in block_sizes:
            layers: list[nn.Module] = []
            if not self.blocks:
                strides = [1] + [2] * (num_scales - 1)
                layers.append(BaseFeatures(in_channels, widths(), strides))
            for _ in range(block_size):
                drop_finest = num_layers > 0 and num_layers % layers_per_scale == 0
                growths = [growth * factor for factor in growth_factors[finest:]]
                layers.append(
                    _DenseLayer(widths(), growths, bottleneck_factors[finest:], drop_finest)
                )
                width += growth
                num_layers += 1
                if drop_finest:
                    finest += 1
                    wide = widths()
                    width //= 2
                    layers.append(_Transition(wide, widths()))
            self.blocks.append(nn.Sequential(*layers))
            self.exits.append(image_exit(widths()[-1], num_classes))

        initialize(self)

    def advance(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """Images [B,in_channels,H,W], later feature maps; the exit reads the coarsest."""
        if k == 0:
            check_image_size(state, self.max_image_size)
        features = self.blocks[k](state)
        return features[-1], features
