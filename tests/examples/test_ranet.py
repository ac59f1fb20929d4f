"""RANet against the costs and sizes published for it."""

from typing import Any

import pytest
import torch
from torch import nn

from published_costs import PUBLISHED_EXTRAS, cumulated_costs, in_millions
from ranet import RANet
from reweight import exit_costs

# Settings; million multiply-adds up to each exit, for images of 3x32x32 and 100 classes; million
# parameters in all.
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "6 exits": ({}, "8.37 21.79 32.88 41.57 53.28 58.99", "2.62"),
    "8 exits, anytime": (
        {
            "scales": (1, 2, 3, 3),
            "growth_factors": (4, 2, 1, 1),
            "bottleneck_factors": (4, 2, 1, 1),
            "step": 4,
            "spacing": "even",
        },
        "15.83 31.31 44.69 50.40 60.71 63.72 90.26 95.00",
        "3.35",
    ),
    "8 exits, 1-2-2-3": (
        {
            "scales": (1, 2, 2, 3),
            "growth_factors": (4, 2, 2, 1),
            "bottleneck_factors": (4, 2, 2, 1),
        },
        "10.74 24.16 35.25 43.94 93.07 114.68 164.02 175.74",
        "5.19",
    ),
    "8 exits, 1-2-3-3": (
        {
            "scales": (1, 2, 3, 3),
            "growth_factors": (4, 2, 1, 1),
            "bottleneck_factors": (4, 2, 1, 1),
        },
        "10.75 24.16 35.25 43.95 55.66 61.37 105.64 117.36",
        "4.06",
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_costs_and_sizes_are_the_published_ones(case: str) -> None:
    settings, published_costs, published_size = PUBLISHED[case]
    model = RANet(100, **settings)
    costs, sizes = cumulated_costs(model, torch.zeros(1, 3, 32, 32))
    assert in_millions(costs) == published_costs
    assert in_millions(sizes).endswith(published_size)
    assert sizes[-1] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", PUBLISHED)
def test_exit_costs_of_the_library_are_the_published_ones(case: str) -> None:
    """All but the biases of the exits seen so far, 100 each, which the library does not count."""
    settings, published_costs, _ = PUBLISHED[case]
    costs = exit_costs(
        RANet(100, **settings),
        torch.zeros(1, 3, 32, 32),
        in_order=True,
        custom_mapping=PUBLISHED_EXTRAS,
    )
    costs = [cost + 100 * (k + 1) for k, cost in enumerate(costs)]
    assert in_millions(costs) == published_costs


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 24, 20)])
@pytest.mark.parametrize(
    ("settings", "num_exits"),
    [
        ({}, 6),
        ({"num_blocks": 1, "block_step": 1, "step": 1}, 3),
        (
            {
                "scales": (1, 1),
                "growth_factors": (2, 1),
                "bottleneck_factors": (1, 2),
                "spacing": "even",
            },
            4,
        ),
        ({"scales": (1,), "growth_factors": (1,), "bottleneck_factors": (1,)}, 2),
    ],
    ids=str,
)
def test_every_exit_classifies_and_every_parameter_learns(
    shape: tuple[int, ...], settings: dict[str, Any], num_exits: int
) -> None:
    torch.manual_seed(0)
    model = RANet(7, in_channels=shape[0], **settings)
    side = model.max_image_size
    logits = model(torch.randn(2, *shape)[..., :side, :side])
    assert [exit_logits.shape for exit_logits in logits] == [(2, 7)] * num_exits
    sum(exit_logits.square().sum() for exit_logits in logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_exits_are_computed_in_order() -> None:
    """A sub-network fuses as many blocks as the coarser one has; each of the others has an exit."""
    model = RANet(10)
    ran = []

    def record(module: nn.Module, event: tuple[Any, ...]) -> None:
        module.register_forward_hook(lambda *_: ran.append(event))

    for i, blocks in enumerate(model.subnets):
        for number, block in enumerate(blocks):
            record(block, ("block", i, number))
    for k, classifier in enumerate(model.exits):
        record(classifier, ("exit", k))
    model(torch.randn(2, 3, 32, 32))
    expected: list[tuple[Any, ...]] = []
    for i, (num_fusions, num_blocks) in enumerate([(0, 2), (2, 4), (4, 6)]):
        expected += [("block", i, number) for number in range(num_fusions)]
        for number in range(num_fusions, num_blocks):
            expected += [("block", i, number), ("exit", 2 * i + number - num_fusions)]
    assert ran == expected


def test_finer_subnetworks_see_the_coarser_ones() -> None:
    """What the first sub-network computed reaches the last exit by fusion alone."""
    model = RANet(10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)[-1]
        for parameter in model.subnets[0].parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(model(images)[-1], before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"block_step": 0}, "block_step must be at least 1, got 0"),
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"growth": 3}, "growth must be at least 4, got 3"),
        ({"growth_factors": (4, 0, 1)}, "smallest of growth_factors must be at least 1, got 0"),
        ({"growth_factors": (2, 1)}, "growth_factors must have one entry .* 3 scales, got 2"),
        ({"bottleneck_factors": (1, 2)}, "bottleneck_factors must have one entry .*got 2"),
        ({"scales": ()}, "the number of scales must be at least 1, got 0"),
        ({"scales": (1, 3, 4)}, r"stay or rise by 1 each time, got \(1, 3, 4\)"),
        ({"scales": (2, 2, 3)}, r"must begin with 1.*got \(2, 2, 3\)"),
        ({"scales": (1, 2, 1)}, r"stay or rise by 1 each time, got \(1, 2, 1\)"),
        ({"spacing": "odd"}, 'spacing must be "lg" or "even", got \'odd\''),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RANet(**{"num_classes": 10, **wrong})


def test_too_large_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"at most 32 pixels a side.*got \[1, 3, 224, 224\]"):
        RANet(10)(torch.zeros(1, 3, 224, 224))
