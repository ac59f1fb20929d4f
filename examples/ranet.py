"""RANet for small images: sub-networks of rising resolution, the coarsest of which answers first.

Yang et al., "Resolution Adaptive Networks for Efficient Inference", CVPR 2020. The defaults are its
smallest CIFAR network for budgeted batches.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convolutions import BaseFeatures, bottleneck, check_image_size, conv, image_exit, initialize
from staged import StagedNet

__all__ = ["RANet"]


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class _Block(nn.Module):
    """Layers that each append `growth` channels.

    Gives what comes out of the block, and the features before, between and after its layers, which
    the block of the same place in the next finer sub-network fuses with its own.
    """

    def __init__(
        self, channels: int, num_layers: int, growth: int, factor: int, reduce: bool
    ) -> None:
        super().__init__()
        self.feature_channels = [channels + growth * i for i in range(num_layers + 1)]
        self.layers = nn.ModuleList(
            bottleneck(source, growth, factor) for source in self.feature_channels[:-1]
        )
        self.transition, self.out_channels = _transition(self.feature_channels[-1], reduce)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = [x]
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
            features.append(x)
        return self.transition(x), features


class _FusionBlock(nn.Module):
    """A block that takes a quarter of its growth from the features of the next coarser sub-network.

    In the end it appends a quarter more, from the last of these features. With `halve` its last
    layer halves the resolution.
    """

    def __init__(
        self,
        channels: int,
        channels_below: Sequence[int],
        growth: int,
        factor: int,
        factor_below: int,
        reduce: bool,
        halve: bool,
    ) -> None:
        super().__init__()
        num_layers = len(channels_below) - 1
        self.feature_channels = [channels + growth * i for i in range(num_layers + 1)]
        quarter = growth // 4
        self.above = nn.ModuleList(
            bottleneck(source, quarter, factor_below) for source in channels_below[:-1]
        )
        self.own = nn.ModuleList(
            bottleneck(source, growth - quarter, factor, 2 if halve and i == num_layers - 1 else 1)
            for i, source in enumerate(self.feature_channels[:-1])
        )
        last = self.feature_channels[-1]
        self.last = conv(channels_below[-1], last // 4, 1)
        self.transition, self.out_channels = _transition(last + last // 4, reduce)

    def forward(self, x: Tensor, below: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        features = [x]
        for own, above, coarse in zip(self.own, self.above, below[:-1], strict=True):
            new = own(x)
            x = torch.cat([_resize(x, new), _resize(above(coarse), new), new], dim=1)
            features.append(x)
        x = torch.cat([x, _resize(self.last(below[-1]), x)], dim=1)
        return self.transition(x), features


def _transition(channels: int, reduce: bool) -> tuple[nn.Module, int]:
    """Half the channels, or all of them as they are; and how many come out."""
    if not reduce:
        return nn.Identity(), channels
    return conv(channels, channels // 2, 1), channels // 2


class _State(NamedTuple):
    """What the stages ahead read.

    Attributes:
        bases: base features of the sub-networks ahead, coarsest first.
        x: what the next block reads.
        below: features of the blocks of the coarser sub-network that are yet to be fused.
        own: features of this sub-network's blocks so far, if there is a finer one.
    """

    bases: list[Tensor]
    x: Tensor
    below: list[list[Tensor]]
    own: list[list[Tensor]]


class RANet(StagedNet):
    """Resolution adaptive network: `num_blocks + block_step * (sub-networks - 1)` classifiers.

    Sub-network i has `num_blocks + block_step * i` blocks. As many as the coarser one has fuse its
    features with their own; each of the others ends in an exit. Block j has `step * j` layers, or
    `step`. In sub-networks of scale s the resolution is halved s - 1 times, to that of the first,
    and the channels are halved as often.

    Args:
        num_classes: Classes C of every exit.
        in_channels: Channels of the image.
        channels: Channels of the base features, times the sub-network's growth factor.
        growth: Channels each layer adds, times the sub-network's growth factor; a multiple of 4 or
            more, for a quarter comes from the coarser sub-network.
        growth_factors: One for each sub-network, coarsest first.
        bottleneck_factors: Widest bottleneck of each sub-network, in multiples of what its 3x3
            convolution puts out.
        scales: Scale of each sub-network's base features, coarsest first: 1, and then the same as
            before or one more. The last is that of the image.
        num_blocks: Blocks of the first sub-network.
        block_step: Blocks that each later one has more.
        step: Layers of the first block.
        spacing: "lg" (the later blocks grow by `step`) or "even".
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        channels: int = 16,
        growth: int = 6,
        growth_factors: Sequence[int] = (4, 2, 1),
        bottleneck_factors: Sequence[int] = (4, 2, 1),
        scales: Sequence[int] = (1, 2, 3),
        num_blocks: int = 2,
        block_step: int = 2,
        step: int = 2,
        spacing: Literal["lg", "even"] = "lg",
    ) -> None:
        super().__init__()
        counts = {
            "num_classes": (num_classes, 1),
            "in_channels": (in_channels, 1),
            "channels": (channels, 1),
            "num_blocks": (num_blocks, 1),
            "block_step": (block_step, 1),
            "step": (step, 1),
            "the number of scales": (len(scales), 1),
            "the smallest of growth_factors": (min(growth_factors, default=1), 1),
            "the smallest of bottleneck_factors": (min(bottleneck_factors, default=1), 1),
            "growth": (growth, 4),
        }
        for name, (count, least) in counts.items():
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        for name, factors in (
            ("growth_factors", growth_factors),
            ("bottleneck_factors", bottleneck_factors),
        ):
            if len(factors) != len(scales):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(scales)} scales, "
                    f"got {len(factors)}"
                )
        strides = [after - before for before, after in zip([0, *scales], scales, strict=False)]
        if strides[0] != 1 or any(stride not in (0, 1) for stride in strides):
            raise ValueError(
                f"scales must begin with 1 and stay or rise by 1 each time, got {tuple(scales)}"
            )
        if spacing not in ("lg", "even"):
            raise ValueError(f'spacing must be "lg" or "even", got {spacing!r}')

        self.max_image_size = 2 ** (scales[-1] + 2)
        widths = [channels * factor for factor in growth_factors]
        # From fine to coarse: a stride of 2 wherever the scale rises from coarse to fine.
        self.bases = BaseFeatures(
            in_channels, widths[::-1], [1, *(1 + rise for rise in strides[:0:-1])]
        )
        self.subnets = nn.ModuleList()  # of lists of blocks
        self.exits = nn.ModuleList()
        sizes = [num_blocks + block_step * i for i in range(len(scales))]
        below: list[_Block | _FusionBlock] = []
        for i, scale in enumerate(scales):
            width = widths[i]
            reduced = {sizes[i] * part // scale for part in range(1, scale)}
            halved = sizes[:i][i - (scale - 1) :]
            blocks: list[_Block | _FusionBlock] = []
            for number in range(1, sizes[i] + 1):
                reduce = number in reduced
                growth_here = growth * growth_factors[i]
                block: _Block | _FusionBlock
                if number <= len(below):
                    block = _FusionBlock(
                        width,
                        below[number - 1].feature_channels,
                        growth_here,
                        bottleneck_factors[i],
                        bottleneck_factors[i - 1],
                        reduce,
                        halve=number in halved,
                    )
                else:
                    num_layers = step * number if spacing == "lg" else step
                    block = _Block(width, num_layers, growth_here, bottleneck_factors[i], reduce)
                    self.exits.append(image_exit(block.out_channels, num_classes))
                blocks.append(block)
                width = block.out_channels
            self.subnets.append(nn.ModuleList(blocks))
            below = blocks
        # The sub-network and the last block of each exit.
        self._places = [
            (i, number)
            for i, size in enumerate(sizes)
            for number in range(sizes[i - 1] if i else 0, size)
        ]
        initialize(self)

    def advance(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """Images [B,in_channels,H,W], later what stages ahead read; the exit reads a block."""
        if k == 0:
            check_image_size(state, self.max_image_size)
            coarsest, *finer = self.bases(state)[::-1]
            state = _State(finer, coarsest, [], [])
        bases, x, below, own = state
        subnet, last = self._places[k]
        blocks = cast(nn.ModuleList, self.subnets[subnet])
        first = last if k and self._places[k - 1][0] == subnet else 0
        for block in blocks[first : last + 1]:
            if isinstance(block, _FusionBlock):
                x, features = block(x, below[0])
                below = below[1:]
            else:
                x, features = block(x)
            if bases:
                own = [*own, features]
        if bases and last == len(blocks) - 1:
            return x, _State(bases[1:], bases[0], own, [])
        return x, _State(bases, x, below, own)
