"""Which tensors lie over the memory of a parameter."""

import pytest
import torch
from torch import Tensor, nn

from reweight._passes.aliases import aliases

MEMORY = torch.zeros(4, 6)
PARAMETER = nn.Parameter(MEMORY[:2])
CASES = {
    "itself, which moves": (PARAMETER, False),
    "a copy": (PARAMETER.detach().clone(), False),
    "detached": (PARAMETER.detach(), True),
    "one entry": (PARAMETER.data[1, 5], True),
    "an array over it": (torch.from_numpy(PARAMETER.detach().numpy()), True),
    "all of its memory": (MEMORY, True),
    "beside it": (MEMORY[2:], False),
    "nothing": (MEMORY[:0], False),
    "with a graph": (PARAMETER[0], False),
}


@pytest.mark.parametrize(("other", "expected"), CASES.values(), ids=CASES.keys())
def test_an_alias_shares_a_byte_and_has_no_graph(other: Tensor, expected: bool) -> None:
    assert aliases({"p": PARAMETER}, [other]) == ["p"] * expected
