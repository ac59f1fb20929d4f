"""How far finite differences are from the exact hypergradient, by precision and step.

Prints the relative error of ∂L_meta/∂w for steps h·‖v‖ from 1e-6 to 1 of ‖θ‖ on a five-exit
convolutional net with BatchNorm and ReLU, and last for the step that the library takes. The exact
value is that of forward mode in float64.

    python benchmarks/finite_difference.py
"""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from torch import Tensor, nn
from torch.optim import SGD

from reweight import MeanObjective, MetaReweightStep, exit_cross_entropy
from reweight._meta import estimators, problem

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from small import MultiExitConvNet

STEPS = [10.0**-k for k in range(7)]
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


class Blind(estimators.DifferenceWatch):
    """Does not see low precision, so that each step asked for is the one taken."""

    def __setattr__(self, name: str, value: object) -> None:
        """Takes everything but the precision."""
        if name != "precision":
            super().__setattr__(name, value)


class Fixed(nn.Module):
    """Weights that are parameters, whose gradient is the hypergradient."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, losses: object) -> Tensor:
        """The weights, whatever the losses."""
        return self.weights


def measure(model: nn.Module, batches: list[tuple[Tensor, Tensor]], estimator: str) -> Tensor:
    """The hypergradient [B, K] in float64."""
    weights = Fixed(torch.ones(len(batches[0][1]), 5))
    MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        weights,
        reweighter_optimizer=SGD(weights.parameters(), lr=1.0),
        objective=MeanObjective(),
        estimator=estimator,
    ).update_reweighter(*batches)
    return 1 - weights.weights.detach().double()


def main() -> None:
    """Measure and print one row for each precision."""
    torch.manual_seed(0)
    model = MultiExitConvNet((3, 32, 32), 10)
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(2)]
    optimizer = SGD(model.parameters(), lr=0.05)
    for _ in range(20):  # away from the first parameters
        optimizer.zero_grad()
        exit_cross_entropy(model(batches[0][0]), batches[0][1]).losses.mean(0).sum().backward()
        optimizer.step()
    exact = measure(copy.deepcopy(model).double(), [(x.double(), y) for x, y in batches], "forward")
    print(f"{'step / |theta|':>18}", *(f"{step:>9.0e}" for step in STEPS), f"{'ours':>9}")
    for name, (dtype, autocast) in PRECISIONS.items():
        cast = [(x.to(dtype), y) for x, y in batches]
        errors = []
        for step in [*STEPS, None]:
            twin = copy.deepcopy(model).to(dtype)
            with ExitStack() as stack:
                if step is not None:
                    precision = Mock(return_value=step**1.5)
                    stack.enter_context(patch.object(problem, "working_precision", precision))
                    stack.enter_context(patch.object(estimators, "DifferenceWatch", Blind))
                if autocast:
                    stack.enter_context(torch.autocast("cpu", autocast))
                found = measure(twin, cast, "finite_difference")
            errors.append(((found - exact).norm() / exact.norm()).item())
        print(f"{name:>18}", *(f"{error:>9.1e}" for error in errors))


if __name__ == "__main__":
    main()
