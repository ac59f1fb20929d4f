import pytest


@pytest.fixture(autouse=True)
def in_double_precision(double_precision) -> None:
    """Every test here."""
