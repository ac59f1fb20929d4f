import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from reweight._kernels import function, linear, torch_kernels

torch.set_num_threads(1)  # the tensors here are tiny


MADE_ONCE = ("test_collectives.py", "test_shards.py", "test_faults.py", "test_train.py")
"""Files whose tests look at what the same ranks, or the same run, have made."""


class ByTest(LoadScopeScheduling):
    """A free worker takes the next test, or the next of those files, which come first."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return file if file.endswith(MADE_ONCE) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByTest | None:
    return ByTest(config, log) if config.option.dist == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("card"):
                item.add_marker(pytest.mark.skip(reason="needs a card"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
