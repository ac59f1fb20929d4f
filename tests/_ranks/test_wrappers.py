"""What a model may be wrapped in, and what is inside."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cases import make_model
from ranks import process_group
from reweight._ranks.wrappers import averages, is_unsettled, unwrap


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with process_group(0, 1, f"file://{tmp_path_factory.mktemp('group')}/store"):
        yield dist.group.WORLD


def test_a_bare_model_is_what_it_is() -> None:
    model = make_model("mlp")
    assert unwrap(model) == (model, None)
    assert averages(model)
    assert not is_unsettled(model)


def test_the_model_inside_and_its_group(group) -> None:
    model = make_model("mlp")
    wrapped = DistributedDataParallel(model)
    for outer in (wrapped, torch.compile(wrapped, backend="eager")):
        assert unwrap(outer) == (model, wrapped.process_group)
        assert averages(outer)
        with wrapped.no_sync():
            assert not averages(outer)


def test_a_static_graph_is_unsettled_until_its_first_backward(group) -> None:
    model = make_model("mlp")
    wrapped = DistributedDataParallel(model, static_graph=True)
    assert not is_unsettled(DistributedDataParallel(make_model("mlp")))
    assert is_unsettled(wrapped)
    torch.stack(wrapped(torch.ones(2, 6, dtype=torch.float64))).sum().backward()
    assert not is_unsettled(wrapped)


def test_other_wrappers_are_refused(group) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        unwrap([])
    inside = nn.Sequential(DistributedDataParallel(make_model("mlp")))
    with pytest.raises(TypeError, match="must not hold DistributedDataParallel"):
        unwrap(inside)

    class DistributedDataParallelOfMine(nn.Sequential):
        pass

    assert unwrap(DistributedDataParallelOfMine())[1] is None
