"""The map in CONTRIBUTING.md is the package; ``import reweight`` loads its dependencies alone."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reweight

PACKAGE = Path(reweight.__file__).parent
ROOT = Path(__file__).parents[1]


def rooms() -> dict[str, tuple[set[str], str]]:
    """What each room may import, and where it is tested, by the table in CONTRIBUTING.md."""
    found: dict[str, tuple[set[str], str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if not re.match(r"\| `[a-z_]+(\.py|/)` \|", line):
            continue
        name, _, imports, tests = line.strip("| ").split(" | ")
        named = set(re.findall(r"`([a-z_]+)`", imports))
        allowed = found.keys() - named if imports.startswith("all above") else named
        room = re.sub(r"`|\.py|/", "", name)
        found[room] = set(allowed) | {room}, tests.strip("`/ ")
    return found


ROOMS = rooms()
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
]


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(name: str) -> set[str]:
    """The modules of the package that one of them imports."""
    tree = ast.parse(PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reweight"):
            for each in node.names:
                inner = f"{node.module}.{each.name}".removeprefix("reweight.")
                found.add(inner if inner in MODULES else node.module.removeprefix("reweight."))
    return found


def test_every_room_has_its_line() -> None:
    assert {room_of(module) for module in MODULES} == ROOMS.keys()


def test_rooms_import_only_what_stands_above_them() -> None:
    order = list(ROOMS)
    for room, (allowed, _) in ROOMS.items():
        assert all(order.index(other) <= order.index(room) for other in allowed), room


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_its_room_may(name: str) -> None:
    own = room_of(name)
    allowed, _ = ROOMS[own]
    assert {room_of(module) for module in imports(name)} <= allowed
    for module in imports(name):
        if room_of(module) != own and "." in module:
            room = importlib.import_module(f"reweight.{room_of(module)}")
            assert module.partition(".")[2] in room.__all__, f"{module} is for its room alone"


def test_no_chain_of_imports_is_longer_than_ten_modules() -> None:
    @functools.cache
    def length(name: str) -> int:
        return 1 + max(map(length, imports(name) - {name}), default=0)

    assert max(map(length, MODULES)) <= 10


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_a_room_says_what_it_is_for(room: str) -> None:
    lines = (PACKAGE / room / "__init__.py").read_text().splitlines()
    assert len(lines) <= 5
    assert lines[0].startswith('"""')


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__init__")])
def test_every_module_has_a_test_file(name: str) -> None:
    file = f"test_{name.rpartition('.')[2].lstrip('_')}.py"
    assert (ROOT / ROOMS[room_of(name)][1] / file).exists()


def test_public_names_are_those_of_the_init() -> None:
    assert sorted(reweight.__all__) == reweight.__all__
    assert all(hasattr(reweight, name) for name in reweight.__all__)


def test_import_loads_no_extra() -> None:
    """Of all that is installed here, ``import reweight`` loads only what its dependencies do."""

    code = (
        "import sys, torch, torchopt, numpy\n"
        "def loaded(): return {name.partition('.')[0] for name in sys.modules}\n"
        "before = loaded(); import reweight; print(*loaded() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    extra = set(done.stdout.decode().split()) - set(sys.stdlib_module_names)
    assert extra == {"reweight"}


def test_no_file_is_loaded_twice() -> None:
    """What the second run of a test's module registers would take the place of the first's."""
    files = [file for each in list(sys.modules.values()) if (file := getattr(each, "__file__", ""))]
    folders = [ROOT / name for name in ("reweight", "tests", "benchmarks", "examples")]
    ours = [file for file in files if any(map(Path(file).is_relative_to, folders))]
    assert ours
    assert sorted(ours) == sorted(set(ours))
