"""MSDNet against the costs and sizes published for it."""

from typing import Any

import pytest
import torch
from torch import nn

from msdnet import MSDNet
from published_costs import PUBLISHED_EXTRAS, cumulated_costs, in_millions
from reweight import exit_costs

ANYTIME: dict[str, Any] = {"base": 4, "step": 2, "spacing": "even"}

# Settings; million multiply-adds up to each exit, for images of 3x32x32; million parameters up to
# each exit, or in all.
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "5 exits": (
        {"num_classes": 100},
        "6.86 14.35 27.54 41.71 58.48",
        "0.30 0.65 1.02 1.49 2.08",
    ),
    "5 exits, 10 classes": (
        {"num_classes": 10},
        "6.85 14.33 27.50 41.67 58.42",
        "0.29 0.63 0.98 1.45 2.02",
    ),
    "7 exits": (
        {"num_classes": 100, "num_exits": 7},
        "6.86 14.35 27.29 48.45 76.43 108.85 137.28",
        "3.97",
    ),
    "7 exits, anytime": (
        {"num_classes": 100, "num_exits": 7, **ANYTIME},
        "15.14 25.51 37.10 46.33 57.34 66.96 75.94",
        "0.43 0.88 1.27 1.70 2.18 2.60 3.07",
    ),
    "10 exits, anytime": (
        {"num_classes": 100, "num_exits": 10, **ANYTIME},
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68",
        "4.96",
    ),
    "7 exits, anytime, growth 16": (
        {"num_classes": 100, "num_exits": 7, "growth": 16, **ANYTIME},
        "56.43 101.00 155.31 198.10 249.53 298.05 340.64",
        "7.36",
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_costs_and_sizes_are_the_published_ones(case: str) -> None:
    settings, published_costs, published_sizes = PUBLISHED[case]
    model = MSDNet(**settings)
    costs, sizes = cumulated_costs(model, torch.zeros(1, 3, 32, 32))
    assert in_millions(costs) == published_costs
    assert in_millions(sizes).endswith(published_sizes)
    assert sizes[-1] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", PUBLISHED)
def test_exit_costs_of_the_library_are_the_published_ones(case: str) -> None:
    settings, published_costs, _ = PUBLISHED[case]
    images = torch.zeros(1, 3, 32, 32)
    model = MSDNet(**settings)
    costs = exit_costs(model, images, in_order=True, custom_mapping=PUBLISHED_EXTRAS)
    assert in_millions(costs) == published_costs
    needed = exit_costs(model, images)
    assert all(0.8 * cost < need < cost for need, cost in zip(needed, costs, strict=True))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 24, 20)])
@pytest.mark.parametrize("settings", [{}, {"num_exits": 3, "base": 2, "step": 2}, ANYTIME], ids=str)
def test_every_exit_classifies_and_every_parameter_learns(
    shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = MSDNet(7, in_channels=shape[0], **settings)
    logits = model(torch.randn(2, *shape))
    assert [exit_logits.shape for exit_logits in logits] == [(2, 7)] * settings.get("num_exits", 5)
    sum(exit_logits.square().sum() for exit_logits in logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_exits_are_computed_in_order() -> None:
    """So that who stops at an exit has paid for nothing behind it."""
    model = MSDNet(10)
    ran = []
    for number in range(5):
        for kind, modules in (("block", model.blocks), ("exit", model.exits)):
            modules[number].register_forward_hook(
                lambda *_, event=(number, kind): ran.append(event)
            )
    model(torch.randn(2, 3, 32, 32))
    assert ran == [(number, kind) for number in range(5) for kind in ("block", "exit")]


@pytest.mark.parametrize("num_scales", [1, 2, 4])
def test_number_of_scales_follows_the_factors(num_scales: int) -> None:
    factors = (1, 2, 4, 4)[:num_scales]
    model = MSDNet(10, num_exits=3, growth_factors=factors, bottleneck_factors=factors)
    side = model.max_image_size
    logits = model(torch.randn(2, 3, side, side))
    assert [exit_logits.shape for exit_logits in logits] == [(2, 10)] * 3


def test_initial_weights_keep_the_variance_of_the_gradient() -> None:
    torch.manual_seed(0)
    conv = max(
        (m for m in MSDNet(10).modules() if isinstance(m, nn.Conv2d)),
        key=lambda module: module.weight.numel(),
    )
    fan_out = conv.out_channels * conv.kernel_size[0] ** 2
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_exits": 0}, "num_exits must be at least 1, got 0"),
        ({"growth": -1}, "growth must be at least 1, got -1"),
        ({"base": 0}, "base must be at least 1, got 0"),
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"growth_factors": ()}, "number of growth_factors must be at least 1, got 0"),
        ({"growth_factors": (1, 0, 4)}, "smallest of growth_factors must be at least 1, got 0"),
        ({"bottleneck_factors": (1, 2)}, "one entry for each of the 3 growth_factors, got 2"),
        ({"spacing": "odd"}, 'spacing must be "lin_grow" or "even", got \'odd\''),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSDNet(**{"num_classes": 10, **wrong})


def test_too_large_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"at most 32 pixels a side.*got \[1, 3, 224, 224\]"):
        MSDNet(10)(torch.zeros(1, 3, 224, 224))
