"""MSDNet for small images: dense features at several scales, an exit after every block.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018.
The defaults are its smallest CIFAR network for budgeted batches.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["MSDNet"]


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _bottleneck(in_channels: int, out_channels: int, factor: int, stride: int = 1) -> nn.Sequential:
    inner_channels = min(in_channels, factor * out_channels)
    return nn.Sequential(
        _conv(in_channels, inner_channels, 1), _conv(inner_channels, out_channels, 3, stride)
    )


class _FirstLayer(nn.Module):
    """Image [B,C,H,W] to one feature map a scale, finest first, each half the size of the last."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        sources = [in_channels, *channels[:-1]]
        self.scales = nn.ModuleList(
            _conv(source, target, 3, stride=1 if scale == 0 else 2)
            for scale, (source, target) in enumerate(zip(sources, channels, strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for conv in self.scales:
            x = conv(x)
            features.append(x)
        return features


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
            self.same.append(_bottleneck(channels[0], growths[0], bottleneck_factors[0]))
        for scale in range(1, len(channels)):
            finer = scale - 1
            half = growths[scale] // 2
            self.down.append(
                _bottleneck(channels[finer], half, bottleneck_factors[finer], stride=2)
            )
            self.same.append(
                _bottleneck(channels[scale], growths[scale] - half, bottleneck_factors[scale])
            )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        kept = features[-len(self.same) :]
        parts = [[x, conv(x)] for x, conv in zip(kept, self.same, strict=True)]
        # One strided conv for each scale but the finest of the input, so both lists end alike.
        for number, conv in enumerate(self.down):
            parts[number - len(self.down)].append(conv(features[number]))
        return [torch.cat(part, dim=1) for part in parts]


class _Transition(nn.Module):
    """Change the number of channels of every scale by a 1x1 convolution."""

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            _conv(source, target, 1)
            for source, target in zip(in_channels, out_channels, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.scales, features, strict=True)]


def _exit(in_channels: int, num_classes: int) -> nn.Sequential:
    # Images of 32 arrive with 8 pixels a side and leave the convolutions with 2, images of 28 with
    # 7 and 2. Smaller ones leave them with 1, which only `ceil_mode` pools.
    return nn.Sequential(
        _conv(in_channels, 128, 3, stride=2),
        _conv(128, 128, 3, stride=2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


class MSDNet(nn.Module):
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
            layers: list[nn.Module] = [] if self.blocks else [_FirstLayer(in_channels, widths())]
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
            self.exits.append(_exit(widths()[-1], num_classes))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B,in_channels,H,W] to the logits of every exit, K times [B,C]."""
        if max(x.shape[-2:]) > self.max_image_size:
            raise ValueError(
                f"images must have at most {self.max_image_size} pixels a side (the exits' pools "
                f"cover no more), got {list(x.shape)}; shrink or crop them, or add a scale"
            )
        features, logits = x, []
        for block, exit_ in zip(self.blocks, self.exits, strict=True):
            features = block(features)
            logits.append(exit_(features[-1]))
        return logits
