from typing import Any

import pytest
from torch import Tensor

from reweight._passes.recall import Recall


@pytest.fixture
def recalled(monkeypatch) -> list[tuple[Any, Tensor]]:
    """Functions and what they had come to, where it was recalled."""
    found: list[tuple[Any, Tensor]] = []
    ask = Recall.value

    def value(self, call) -> Tensor | None:
        result = ask(self, call)
        if result is not None and call.held:
            found.append((call.func, result))
        return result

    monkeypatch.setattr(Recall, "value", value)
    return found
