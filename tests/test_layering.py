"""A module imports only what stands above it; the package loads its dependencies alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reweight

PACKAGE = Path(reweight.__file__).parent
ORDER = [
    "kernels.__init__",
    "kernels.composite",
    "kernels.torch_kernels",
    "kernels.triton_kernels",
    "kernels.function",
    "kernels.linear",
    "kernels.dispatch",
    "checks",
    "batches",
    "shards",
    "distributed",
    "losses",
    "budget",
    "places",
    "forwards",
    "values",
    "duals",
    "compiled",
    "costs",
    "reweighter",
    "objectives",
    "rules",
    "optimizers",
    "updates",
    "problem",
    "hypergradient",
    "lookahead",
    "result",
    "learner",
    "step",
    "__init__",
    "integrations.__init__",
    "integrations.lightning",
    "integrations.huggingface",
    "integrations.vision",
    "plots",
]


def test_every_module_has_its_place() -> None:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert {".".join(path.parts) for path in paths} == set(ORDER)


def imports(name: str) -> set[str]:
    """The modules of the package that one of them imports."""
    tree = ast.parse(PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reweight"):
            for each in node.names:
                inner = f"{node.module}.{each.name}".removeprefix("reweight.")
                found.add(inner if inner in ORDER else node.module.removeprefix("reweight."))
    return found


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name: str) -> None:
    assert all(ORDER.index(module) < ORDER.index(name) for module in imports(name)), imports(name)


def test_only_losses_knows_the_kernels() -> None:
    knowing = {name for name in ORDER if any(m.startswith("kernels.") for m in imports(name))}
    assert {name for name in knowing if not name.startswith("kernels.")} == {"losses"}


def test_public_names_are_those_of_the_init() -> None:
    assert sorted(reweight.__all__) == reweight.__all__
    assert all(hasattr(reweight, name) for name in reweight.__all__)


def test_import_loads_no_extra() -> None:
    """Of all that is installed here, ``import reweight`` loads only what its dependencies do."""

    def loaded(names: str) -> set[str]:
        code = f"import sys, {names}; print(*{{name.partition('.')[0] for name in sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return set(done.stdout.decode().split())

    extra = loaded("reweight") - loaded("torch, torchopt, numpy") - set(sys.stdlib_module_names)
    assert extra == {"reweight"}
