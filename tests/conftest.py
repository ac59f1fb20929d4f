import gc
import logging
import sys
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from reweight._kernels import function, linear, torch_kernels

torch.set_num_threads(1)  # the tensors here are tiny
# pytest listens to loggers of their own: the compiler would write down every graph for it.
logging.getLogger("torch.__trace").propagate = True


FORKED = ("test_collectives.py", "test_shards.py", "test_faults.py", "test_train.py", "processes")
"""What is in the names of tests that fork from one process, which takes long to begin."""


class ByTest(LoadScopeScheduling):
    """A free worker takes the next test; one worker all that fork, which come first."""

    def _split_scope(self, nodeid: str) -> str:
        return "forked" if any(name in nodeid for name in FORKED) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByTest | None:
    return ByTest(config, log) if config.option.dist == "load" else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What tests import holds no doctests: collected, it would be loaded under a second name.

    That would run it twice, and an operator that it registers then is gone from the first.
    """
    is_test = collection_path.name.startswith(("test_", "conftest"))
    return True if collection_path.suffix == ".py" and not is_test else None


def pytest_collection_finish() -> None:
    """What all the modules hold stays: the garbage collector need not go through it each time."""
    gc.freeze()
    if guards := sys.modules.get("torch._dynamo.guards"):
        # The compiler flushes the processor's cache for each graph, to time its guards.
        guards.profile_guard_manager = lambda *args: 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("card"):
                item.add_marker(pytest.mark.skip(reason="needs a card"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double_precision():
    """torch.optim counts steps in the default dtype: in float32 it is the reference that rounds."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["merged", "whole", "in blocks"])
def sizes(request, monkeypatch) -> None:
    """The ways that a size decides, on tensors that are small."""
    if request.param != "merged":
        monkeypatch.setattr(function, "_SMALL", 0)
        monkeypatch.setattr(torch_kernels, "_TINY", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(function, "_LARGE", 0)
        monkeypatch.setattr(torch_kernels, "_WHOLE", 0)
        monkeypatch.setattr(torch_kernels, "_BLOCK", 11)
        monkeypatch.setattr(linear, "_CHUNK", 7)
