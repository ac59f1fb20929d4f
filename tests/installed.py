"""What a user's first script does, against the installed package: run and type-checked in CI.

Run by itself, away from the checkout: ``python installed.py``.
"""

import sys

import numpy  # noqa: F401
import torch
import torchopt  # noqa: F401
from torch import Tensor, nn

ours = set(sys.modules)

import reweight  # noqa: E402
from reweight import MetaReweightStep, SampleReweighter, StepResult  # noqa: E402

loaded = {name.partition(".")[0] for name in set(sys.modules) - ours}
extra = loaded - set(sys.stdlib_module_names) - {"reweight", "torch"}
assert not extra, f"`import reweight` loads more than torch, torchopt and numpy: {sorted(extra)}"


class TwoExits(nn.Module):
    """Logits after one layer and after two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.exits = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Samples [B, 4] → 2 logits [B, 3]."""
        logits = []
        for layer, head in zip(self.layers, self.exits, strict=True):
            x = layer(x).relu()
            logits.append(head(x))
        return logits


def batch() -> tuple[Tensor, Tensor]:
    """Eight random samples."""
    return torch.randn(8, 4), torch.randint(3, (8,))


def train() -> StepResult:
    """Two steps; the last one's result."""
    model = TwoExits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=2))
    for _ in range(2):
        optimizer.zero_grad()
        result = step.backward(batch(), batch())
        optimizer.step()
    return result


def wrong(model: nn.Module) -> None:
    """What a type checker must refuse: it complains here if it does not."""
    MetaReweightStep(model, "sgd", SampleReweighter(2))  # type: ignore[arg-type]
    SampleReweighter(num_exits="2")  # type: ignore[arg-type]


if __name__ == "__main__":
    print(f"reweight {reweight.__version__} of {reweight.__file__}: {train().summary()}")
