"""The sweeps over what others wrote: their oracles are right, and the command runs to its end."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sweeps
from databases import architectures
from databases.judge import BAR, EXACT, NOT_APPLICABLE, REFUSED, WRONG, Case, judge, relative
from databases.oracles import (
    NUM_SAMPLES,
    Expected,
    Training,
    by_differences,
    by_rows,
    some_weights,
)
from databases.runner import read

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


COMMAND = """
import os, sys, threading
import sweeps
from databases.runner import Sweep
sweeps.SWEEPS["broken"] = Sweep(lambda: {"dies": os._exit, "hangs": None}, lambda end, _: (
    end(3) if end else threading.Event().wait()
))
results, *names = sys.argv[1:]
sweeps.main(["--results", results, "--limit", "2", *names])
sweeps.main(["--results", results, "--limit", "2", *names, "--resume"])  # nothing is left to do
sweeps.main(["--results", results, "--broken", "--seconds", "0.3"])
"""


@pytest.mark.skipif(find_spec("expecttest") is None, reason="PyTorch's databases want expecttest")
def test_two_entries_of_each_database_of_pytorch(tmp_path: Path) -> None:
    """In a process of its own, for PyTorch's test code changes global flags when it is loaded."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    names = ("ops", "modules", "optimizers")
    command = [sys.executable, "-c", COMMAND, str(tmp_path), *(f"--{name}" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in names:
        rows = read(tmp_path / f"{name}.csv")
        assert [row["dtype"] for row in rows] == 2 * ["float32", "float64"]
        assert {row["outcome"] for row in rows} == {EXACT}
        assert all("torch" in row["versions"] for row in rows)
    reasons = {row["entry"]: row["reason"] for row in read(tmp_path / "broken.csv")}
    assert reasons == {"dies": "crashed: exit code 3", "hangs": "took longer than 0 s"}
    assert "took longer" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_two_architectures(name: str) -> None:
    entry = architectures.entries()[name]
    (case,) = architectures.cases(entry, torch.float32)
    assert judge(case, torch.float32).outcome == EXACT


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    page = ROOT / "docs" / "compatibility.md"
    assert sweeps.markdown(sweeps.RESULTS) in page.read_text(), "run python benchmarks/sweeps.py"
