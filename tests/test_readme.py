"""The README's code and that of docs/ run as they stand, and their links lead somewhere.

The python blocks of a page are one program, which begins where the README's loop ends. What a page
needs besides, and its reader need not see, is a python block in an HTML comment: it runs with them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import reweight

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))  # run when the site is built


class MultiExitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(5, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stem(x).relu()
        second = self.body(first).relu()
        third = self.body(second).relu()
        return [head(z) for head, z in zip(self.heads, (first, second, third), strict=True)]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(4, (8,))


def names() -> dict[str, object]:
    return {
        "torch": torch,
        "cross_entropy": cross_entropy,
        "MultiExitNet": MultiExitNet,
        "loader": [batch(), batch()],
        "calibration_batch": batch(),
        "test_batch": batch(),
    }


def side_of_diff(diff: str, side: str) -> str:
    kept = [line[1:] for line in diff.splitlines() if line[:1] in (side, " ", "")]
    return "\n".join(kept)


@pytest.mark.parametrize("side", ["-", "+"])
def test_the_loop_trains_before_and_after_the_diff(side: str) -> None:
    (diff,) = blocks("diff")
    scope = names()
    exec(side_of_diff(diff, side), scope)
    assert scope["optimizer"].state, "the optimizer has stepped"
    assert ("step" in scope) == (side == "+")


def test_every_python_block_runs(capsys) -> None:
    scope = names()
    exec(side_of_diff(blocks("diff")[0], "+"), scope)
    for block in blocks("python"):
        exec(block, scope)
    printed = capsys.readouterr().out
    assert "train loss" in printed
    assert "multiply-adds" in printed


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group, for the page on several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of what torch.compile loads
@pytest.mark.parametrize(
    "page",
    # Early exit has a test of its own, for the examples.
    [page for page in PAGES if page.stem != "early_exit"],
    ids=lambda page: page.stem,
)
def test_every_block_of_a_page_runs_after_the_readmes_loop(page: Path, one_process) -> None:
    scope = names()
    exec(side_of_diff(blocks("diff")[0], "+"), scope)
    for block in blocks("python", page.read_text()):
        exec(block, scope)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_no_block_escapes(page: Path) -> None:
    """Every fence says what it is, so that python which does not run cannot pass for something."""
    known = [
        "python",
        "sh",
        "diff",
        "math",
        "text",
        "{toctree}",
        "{include} ../CHANGELOG.md",
        "{eval-rst}",
    ]
    fences = re.findall(r"^[ \t>]*[`~]{3,}(.*)$", page.read_text(), flags=re.MULTILINE)
    assert all(opening in known for opening in fences[::2]), fences[::2]
    assert not any(fences[1::2]), fences[1::2]


def test_the_reference_holds_every_public_name() -> None:
    entries = re.findall(r":: reweight\.(\w+)\n", (ROOT / "docs" / "api.md").read_text())
    assert sorted(entries) == reweight.__all__


def test_costs_to_choose_by_are_those_that_were_measured() -> None:
    pages = ((ROOT / "docs" / name).read_text() for name in ("cost.md", "choosing.md"))
    cell = r" \| (\d\.\d\d, \d\.\d\d)"
    measured, chosen = (
        {name: dict.fromkeys(costs) for name, *costs in re.findall(pattern, page)}
        for page, pattern in zip(
            pages,
            (rf"\| ([^|]*){cell}{cell}{cell}{cell}", rf"\| ([^|]*){cell}{cell}{cell}"),
            strict=True,
        )
    )
    assert len(chosen) == 7
    for name, costs in chosen.items():
        assert list(costs) == [cost for cost in measured[name] if cost in costs], name


def test_commands_are_single_lines_that_set_everything_up() -> None:
    assert [block.strip() for block in blocks("sh")] == [
        'pip install -c constraints.txt -e ".[examples]" && python examples/train.py',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *PAGES, *TUTORIALS],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"(?<!\w)\[[^\]]*\]\((?!http)([^)#]+)\)", prose):
        assert (page.parent / target).exists(), target
