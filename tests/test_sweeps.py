"""The sweeps over what others wrote: their oracles are right, and the command runs to its end."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sweeps
from databases.judge import BAR, EXACT, NOT_APPLICABLE, REFUSED, WRONG, Case, judge, relative
from databases.oracles import (
    NUM_SAMPLES,
    Expected,
    Training,
    by_differences,
    by_rows,
    some_weights,
)

ROOT = Path(__file__).parents[1]


def small(
    dtype: torch.dtype,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    breaks: bool = False,
) -> Training:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    batches = [
        (torch.randn(NUM_SAMPLES, 4, dtype=torch.float64).to(dtype), torch.tensor([0, 2, 1]))
        for _ in range(2)
    ]
    exits = (lambda outputs: outputs[:, :, 0]) if breaks else (lambda outputs: outputs)
    return Training(model, optimizer(model.parameters(), lr=0.1), *batches, exits)


def build(dtype: torch.dtype) -> Training:
    torch.manual_seed(0)
    return small(dtype)


def test_the_oracles_agree() -> None:
    weights = some_weights(NUM_SAMPLES)
    rows = by_rows(build, torch.float64, weights)
    differences = by_differences(build, torch.float64, weights)
    assert relative(rows.value, differences.value, 0) < 1e-9
    assert rows.precision == torch.float64
    # What is below the rounding of this scale is 0, so it must not be large.
    assert rows.value.norm() > 1e-3 * rows.scale


def twice(build, dtype: torch.dtype, weights: Tensor) -> Expected:
    expected = by_rows(build, dtype, weights)
    return expected._replace(value=2 * expected.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (Case("", small), EXACT),
        (Case("", small, twice), WRONG),
        (Case("", partial(small, optimizer=torch.optim.LBFGS), by_differences), REFUSED),
        (Case("", partial(small, breaks=True)), NOT_APPLICABLE),
    ],
    ids=[EXACT, WRONG, REFUSED, NOT_APPLICABLE],
)
def test_outcome(case: Case, outcome: str, dtype: torch.dtype) -> None:
    finding = judge(case, dtype)
    assert finding.outcome == outcome
    if outcome == EXACT:
        assert finding.error is not None
        assert finding.error <= BAR[dtype]
        assert float(finding.double_backward) <= BAR[dtype]
    if outcome in (REFUSED, NOT_APPLICABLE):
        assert finding.reason


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    page = ROOT / "docs" / "compatibility.md"
    assert sweeps.markdown(sweeps.RESULTS) in page.read_text(), "run python benchmarks/sweeps.py"
