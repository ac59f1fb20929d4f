"""Exported exits: the same answers from their own parameters alone."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from export import export_exits
from msdnet import MSDNet
from ranet import RANet
from small import MultiExitMLP

SHAPE = (1, 8, 8)
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MultiExitMLP(SHAPE, 5, num_exits=3, width=4),
    "msdnet": lambda: MSDNet(
        5,
        num_exits=2,
        in_channels=1,
        channels=4,
        growth=4,
        growth_factors=(1, 2),
        bottleneck_factors=(1, 2),
    ),
    "ranet": lambda: RANet(
        5,
        in_channels=1,
        channels=4,
        growth=4,
        growth_factors=(2, 1),
        bottleneck_factors=(2, 1),
        scales=(1, 2),
        num_blocks=1,
        block_step=1,
        step=1,
    ),
}

# torch.export itself, about its own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", NETS)
def test_each_exit_is_a_program_of_what_it_needs(name: str) -> None:
    model = NETS[name]()
    for _ in range(3):
        model(torch.randn(16, *SHAPE))
    model.eval()
    programs = export_exits(model, torch.randn(2, *SHAPE))
    images = torch.randn(5, *SHAPE)
    logits = model(images)
    assert len(programs) == len(logits)
    parameters = dict(model.named_parameters())
    everything = sum(tensor.numel() for tensor in model.state_dict().values())
    for k, program in enumerate(programs):
        # Autograd knows on its own which parameters these logits depend on.
        slopes = torch.autograd.grad(
            logits[k].sum(), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        needed = {n for n, slope in zip(parameters, slopes, strict=True) if slope is not None}
        found = {name.removeprefix("model.") for name, _ in program.named_parameters()}
        assert found == needed
        stored = {name.removeprefix("model.") for name in program.state_dict}
        owners = {name.rpartition(".")[0] for name in needed}
        statistics = {
            name
            for name, _ in model.named_buffers()
            if name.rpartition(".")[0] in owners and not name.endswith("num_batches_tracked")
        }
        assert stored == needed | statistics
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for batch in (images, images[:1]):
            # Other kernels may take another batch size: some units in the last place.
            torch.testing.assert_close(loaded(batch), model(batch)[k], rtol=1e-5, atol=1e-6)
        size = sum(tensor.numel() for tensor in program.state_dict.values())
        assert size < (0.8 if k == 0 else 1) * everything


def test_the_model_stays_as_it_is() -> None:
    model = NETS["mlp"]().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_exits(model, torch.randn(2, *SHAPE))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_refusals() -> None:
    model = NETS["mlp"]()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        export_exits(model, torch.randn(2, *SHAPE))
    with pytest.raises(ValueError, match=r"two samples or more, got shape \[1, 1, 8, 8\]"):
        export_exits(model.eval(), torch.randn(1, *SHAPE))
