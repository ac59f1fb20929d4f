"""The counts of a step stay where they are, on nets that are small.

pytest benchmarks/test_counts.py

The arithmetic is that of the large ones; bytes and launches weigh more here, for the reweighter and
the optimizers are not smaller.
"""

from functools import partial

import pytest
import torch

from counts import Cost, cost_of, counting
from nets import LanguageModel, Net, ViT, images, texts
from small import MultiExitConvNet

NETS = {
    "conv": Net(lambda: MultiExitConvNet((3, 16, 16), 10, 2, 16), 2, partial(images, 64, 10, 16)),
    "vit": Net(lambda: ViT(64, 4), 2, partial(images, 16)),
    "lm": Net(lambda: LanguageModel(512, 32, 64, 4), 2, partial(texts, 8, 512, 32)),
}
BARS = {"conv": (3.9, 3.35), "vit": (4.0, 3.75), "lm": (4.0, 3.75)}
"""Of bytes, and of multiply-adds, over a plain step."""


@pytest.mark.parametrize("name", NETS)
def test_bytes_and_multiply_adds_of_an_exact_step(name: str) -> None:
    plain, exact = (cost_of(NETS[name], "sgd", step) for step in ("plain", "ours, forward"))
    bytes_bar, products_bar = BARS[name]
    assert exact.bytes / plain.bytes < bytes_bar
    assert exact.multiply_adds / plain.multiply_adds < products_bar


def test_what_is_counted() -> None:
    x, weight = torch.randn(4, 6), torch.randn(6, 5)
    with counting() as cost:
        (x.view(24).view(4, 6) @ weight).add_(1).t()
    numbers = (4 * 6 + 6 * 5 + 4 * 5) + 2 * 4 * 5
    assert (cost.launches, cost.bytes, cost.multiply_adds) == (2, 4 * numbers, 4 * 6 * 5)
    assert cost.seconds(1.0, torch.inf, 0.0) == 4 * numbers
    assert cost.seconds(torch.inf, 1.0, 0.0) == 2 * 4 * 6 * 5
    assert cost.seconds(torch.inf, torch.inf, 2.0) == 2 * 2.0
    assert Cost().seconds(1.0, 1.0, 1.0) == 0
