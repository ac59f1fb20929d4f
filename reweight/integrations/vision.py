"""Exits on the feature maps of an image backbone: of timm, of torchvision, or your own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class FeatureExits(nn.Module):
    """A linear exit on the mean of each feature map of a backbone.

    Args:
        backbone: returns its feature maps from the first to the last, as a list, a tuple or a dict:
            ``timm.create_model(name, features_only=True)``, torchvision's
            ``create_feature_extractor``, or your own.
        num_classes: the number of classes, C.
        channels: of each feature map. Default None: ``backbone.feature_info.channels()``, as timm
            gives them.
        channel_dim: where the channels are: 1 (default) for [B, D, H, W], −1 for [B, H, W, D]
            (Swin) and [B, N, D] (tokens). The mean is over all others.
        features: (backbone, inputs) → feature maps, where calling the backbone does not give them,
            as ``lambda vit, x: vit.forward_intermediates(x, intermediates_only=True)``.

    Raises:
        ValueError: no channels are known, or none are given.

    Example:
        >>> import torch
        >>> class Backbone(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)])
        ...     def forward(self, x):
        ...         first = self.stages[0](x).relu()
        ...         return [first, self.stages[1](first).relu()]
        >>> model = FeatureExits(Backbone(), num_classes=10, channels=[8, 16])
        >>> [logits.shape for logits in model(torch.randn(2, 3, 16, 16))]
        [torch.Size([2, 10]), torch.Size([2, 10])]
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: Sequence[int] | None = None,
        *,
        channel_dim: int = 1,
        features: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if channels is None:
            info: Any = getattr(backbone, "feature_info", None)
            channels = info.channels() if hasattr(info, "channels") else ()
        if not channels:
            raise ValueError(
                "`channels` must be the number of channels of each feature map, got none, and "
                "`backbone.feature_info` does not tell."
            )
        self.backbone, self.channels, self.channel_dim = backbone, tuple(channels), channel_dim
        self.features = features
        self.exits = nn.ModuleList(nn.Linear(number, num_classes) for number in self.channels)

    def forward(self, inputs: Any) -> list[Tensor]:
        """Images → K logits [B, C]."""
        maps = (
            self.backbone(inputs) if self.features is None else self.features(self.backbone, inputs)
        )
        maps = list(maps.values() if isinstance(maps, Mapping) else maps)
        found = tuple(each.shape[self.channel_dim] for each in maps)
        if found != self.channels:
            raise ValueError(
                f"`backbone` must return feature maps with {list(self.channels)} channels in "
                f"dimension {self.channel_dim}, got shapes {[list(each.shape) for each in maps]}. "
                "Give `channels`, or `channel_dim=-1` where they are last."
            )
        means = (each.movedim(self.channel_dim, 1).flatten(2).mean(2) for each in maps)
        return [head(mean) for head, mean in zip(self.exits, means, strict=True)]
