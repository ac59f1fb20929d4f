"""What the convolutional nets are made of: 3×3 and 1×1 convolutions, and exits of small images."""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["BaseFeatures", "bottleneck", "check_image_size", "conv", "image_exit", "initialize"]


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size stays, or is halved by a stride of 2."""
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def bottleneck(in_channels: int, out_channels: int, factor: int, stride: int = 1) -> nn.Sequential:
    """1×1 to at most `factor` times the channels that the 3×3 after it puts out."""
    inner_channels = min(in_channels, factor * out_channels)
    return nn.Sequential(
        conv(in_channels, inner_channels, 1), conv(inner_channels, out_channels, 3, stride)
    )


class BaseFeatures(nn.Module):
    """Image [B,C,H,W] to feature maps, finest first, each computed from the one before.

    Args:
        in_channels: of the image.
        channels: of each feature map.
        strides: of each convolution.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        sources = [in_channels, *channels[:-1]]
        self.scales = nn.ModuleList(
            conv(source, target, 3, stride)
            for source, target, stride in zip(sources, channels, strides, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image to feature maps."""
        features = []
        for convolution in self.scales:
            x = convolution(x)
            features.append(x)
        return features


def image_exit(in_channels: int, num_classes: int) -> nn.Sequential:
    """Feature map to logits: two strided convolutions, pooling, a linear layer."""
    # Images of 32 arrive with 8 pixels a side and leave the convolutions with 2, images of 28 with
    # 7 and 2. Smaller ones leave them with 1, which only `ceil_mode` pools.
    return nn.Sequential(
        conv(in_channels, 128, 3, stride=2),
        conv(128, 128, 3, stride=2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


def check_image_size(images: Tensor, largest: int) -> None:
    """The exits pool to a single pixel only up to a size: ValueError beyond it."""
    if max(images.shape[-2:]) > largest:
        raise ValueError(
            f"images must have at most {largest} pixels a side (the exits' pools cover no more), "
            f"got {list(images.shape)}; shrink or crop them, or add a scale"
        )


def initialize(net: nn.Module) -> None:
    """Convolutions drawn to keep the variance of the gradient, biases of linear layers 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
