"""A module imports only what stands above it; the package loads its dependencies alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reweight

PACKAGE = Path(reweight.__file__).parent
ORDER = [
    "losses",
    "budget",
    "batches",
    "forwards",
    "values",
    "duals",
    "costs",
    "reweighter",
    "objectives",
    "rules",
    "updates",
    "problem",
    "hypergradient",
    "result",
    "learner",
    "step",
    "__init__",
]


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = [
        node.module.removeprefix("reweight.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reweight")
    ]
    assert all(ORDER.index(module) < ORDER.index(name) for module in imported), imported


def test_public_names_are_those_of_the_init() -> None:
    assert sorted(reweight.__all__) == reweight.__all__
    assert all(hasattr(reweight, name) for name in reweight.__all__)


def test_import_loads_no_extra() -> None:
    """Examples' and tests' packages stay out of ``import reweight``."""
    extras = ["sklearn", "matplotlib", "rich", "PIL", "pytest", "hypothesis", "torchvision"]
    code = f"import sys, reweight; print([m for m in {extras} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
