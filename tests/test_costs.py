"""Costs against counting by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reweight import exit_costs


class HeadsAtTheEnd(nn.Module):
    """All features first, then all exits, in-place and through views: costs must see through it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 1, bias=False) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(2 * 4 * 4, 5) for _ in range(3)])
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = self.norm(conv(x)).relu_()
            features.append(x)
        return {"exits": [head(f.flatten(1)) for head, f in zip(self.heads, features, strict=True)]}


def test_costs_count_what_each_exit_needs_or_what_ran_before_it() -> None:
    model = HeadsAtTheEnd()
    model.norm.eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    conv, head = 2 * 2 * 16, 2 * 16 * 5
    costs = exit_costs(model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"])
    assert costs == [conv + head, 2 * (conv + head), 3 * (conv + head)]
    in_order = exit_costs(
        model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"], in_order=True
    )
    assert in_order == [3 * conv + head, 3 * conv + 2 * head, 3 * conv + 3 * head]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 2, 4, 4))
    assert costs[-1] == counter.get_total_flops() // 2
    assert all(map(torch.equal, buffers, model.buffers()))


def test_costs_leave_the_modes_of_the_model_as_they_were() -> None:
    model = HeadsAtTheEnd()
    model.norm.eval()
    exit_costs(model, torch.zeros(1, 2, 4, 4), lambda outputs: outputs["exits"])
    assert model.training
    assert not model.norm.training
    with pytest.raises(TypeError, match="Pass `exits=`"):
        exit_costs(model, torch.zeros(1, 2, 4, 4))
    assert model.training


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.recurrence = nn.LSTM(8, 8, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x, mask=None):
        early = self.layer(x)
        late, _ = self.recurrence(early)
        return [head(z) for head, z in zip(self.heads, (early, late), strict=True)]


def test_costs_of_attention_and_recurrence_are_those_counted_by_hand() -> None:
    tokens, width, hidden = 5, 8, 16
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    layer = attention + 2 * tokens * width * hidden
    recurrence = 2 * 4 * tokens * width * width
    head = tokens * width * 3
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for inputs in (torch.zeros(1, 5, 8), (torch.zeros(1, 5, 8),), {"x": torch.zeros(1, 5, 8)}):
        costs = exit_costs(Attends(), inputs)
        assert costs == [layer + head, layer + head + recurrence + head]
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()
