"""Exits on the feature maps of backbones in the ways that libraries give them."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from reweight import MetaReweightStep, SampleReweighter, exit_costs
from reweight.integrations.vision import FeatureExits

CHANNELS = (4, 6, 8)


class Backbone(nn.Module):
    """Like timm's ``features_only=True``, or like others."""

    def __init__(self, kind: str = "list") -> None:
        super().__init__()
        self.kind = kind
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip((3, *CHANNELS[:-1]), CHANNELS, strict=True)
        )
        if kind == "list":
            self.feature_info = SimpleNamespace(channels=lambda: list(CHANNELS))

    def forward_intermediates(self, x: Tensor, intermediates_only: bool) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps if intermediates_only else [x]

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor] | Tensor:
        maps = self.forward_intermediates(x, intermediates_only=True)
        if self.kind == "dict":
            return {f"stage{k}": each for k, each in enumerate(maps)}
        if self.kind == "last":
            return [each.movedim(1, -1) for each in maps]
        if self.kind == "tokens":
            return [each.flatten(2).mT for each in maps]
        return maps if self.kind == "list" else maps[-1]


OPTIONS = {
    "list": {},
    "dict": {"channels": CHANNELS},
    "last": {"channels": CHANNELS, "channel_dim": -1},
    "tokens": {"channels": CHANNELS, "channel_dim": -1},
    "method": {
        "channels": CHANNELS,
        "features": lambda net, x: net.forward_intermediates(x, intermediates_only=True),
    },
}


def make(kind: str) -> FeatureExits:
    torch.manual_seed(0)
    return FeatureExits(Backbone(kind), 5, **OPTIONS[kind]).double()


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_of_backbone_gives_the_same_logits(kind: str) -> None:
    model, images = make(kind), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, x = [], images
    for stage, head in zip(model.backbone.stages, model.exits, strict=True):
        x = stage(x).relu()
        expected.append(head(x.mean((2, 3))))
    # Rounding alone: means add up in another order where the channels are last.
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-14)


def test_a_step_trains_the_backbone_and_every_exit() -> None:
    model = make("list")
    step = MetaReweightStep(model, SGD(model.parameters(), lr=0.1), SampleReweighter(3).double())
    batch = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randint(5, (8,))
    step.backward(batch, batch)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_cost_of_an_exit_is_that_of_the_stages_before_it() -> None:
    costs, stages, before = [], 0, 3
    for k, channels in enumerate(CHANNELS):
        stages += before * channels * 9 * (8 // 2**k) ** 2
        costs.append(stages + 5 * sum(CHANNELS[: k + 1]))
        before = channels
    assert exit_costs(make("list"), torch.zeros(1, 3, 16, 16, dtype=torch.float64)) == costs


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="`channels` must be the number"):
        FeatureExits(Backbone("dict"), 5)
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\[4, 6, 8\] channels in dimension 1, got shapes"):
        FeatureExits(Backbone("last"), 5, CHANNELS)(images)
    with pytest.raises(ValueError, match=r"got shapes \[\[2, 4, 8, 8\]"):
        FeatureExits(Backbone(), 5, CHANNELS[:2])(images)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_real_backbones_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    backbone = timm.create_model(name, features_only=True, pretrained=False)
    model = FeatureExits(backbone, 5, channel_dim=-1 if "swin" in name else 1)
    logits = model(torch.zeros(1, 3, 224, 224))
    assert [each.shape for each in logits] == [(1, 5)] * len(model.channels)
