import importlib

import pytest

from reweight._optimizers import entries


@pytest.fixture(autouse=True)
def in_double_precision(double_precision) -> None:
    """Every test here."""


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """The CPU is taken for a device that is waited for, and counts steps."""
    monkeypatch.setattr(entries, "is_elsewhere", lambda tensor: True)
    for name in ("adam", "adadelta", "asgd", "nadam", "rmsprop"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
