"""The sweeps' command runs to its end, over two entries of each database.

pytest -n 0 benchmarks/test_sweeps.py
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from databases import architectures
from databases.judge import EXACT, judge
from databases.runner import read

ROOT = Path(__file__).parents[1]
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
