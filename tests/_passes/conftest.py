import pytest
import torch
from torch import Tensor

from reweight._passes import memory
from reweight._passes.deferred import Deferred
from reweight._passes.primal_cache import Recall


@pytest.fixture
def all_is_large(monkeypatch) -> None:
    """What is recalled of large tensors is recalled of small ones as well.

    And what is put off is not a number until it is filled, so that who reads it does not go unseen.
    """
    monkeypatch.setattr(memory, "_LARGE", 0)
    put_off = Deferred.put_off
    monkeypatch.setattr(Deferred, "put_off", lambda *args: put_off(*args).fill_(torch.nan))


@pytest.fixture
def recalled(all_is_large, monkeypatch) -> list[Tensor]:
    """The values that were recalled."""
    found: list[Tensor] = []
    ask = Recall.value

    def value(self, call) -> Tensor | None:
        result = ask(self, call)
        if result is not None:
            found.append(result)
        return result

    monkeypatch.setattr(Recall, "value", value)
    return found
