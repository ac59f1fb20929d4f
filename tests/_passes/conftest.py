import pytest
from torch import Tensor

from reweight._passes import primal_cache
from reweight._passes.primal_cache import PrimalCache


@pytest.fixture
def recalled(monkeypatch) -> list[Tensor]:
    """Everything is worth recalling; what was."""
    found: list[Tensor] = []
    ask = PrimalCache.recall

    def recall(self, product) -> Tensor | None:
        value = ask(self, product)
        if value is not None:
            found.append(value)
        return value

    monkeypatch.setattr(primal_cache, "_LARGE", 0)
    monkeypatch.setattr(PrimalCache, "recall", recall)
    return found
