"""What several tests look at, and assert."""

import copy

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_flatten

from reweight import MeanObjective, MetaReweightStep, SampleReweighter


def assert_same(ours: object, theirs: object) -> None:
    """Bitwise the same, through dicts, lists and tuples."""
    leaves, others = tree_flatten(ours)[0], tree_flatten(theirs)[0]
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, other)
        else:
            assert leaf == other


def outcome(model: nn.Module, train, meta, seed: int = 0, **options) -> list[Tensor]:
    """What a step leaves behind: gradients, buffers, reweighter, random state."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    num_exits = len(model(train[0]))
    reweighter = SampleReweighter(num_exits)
    step = MetaReweightStep(
        model,
        SGD(model.parameters(), lr=0.1),
        reweighter.to(train[0].dtype if train[0].is_floating_point() else torch.float64),
        reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
        objective=MeanObjective(),
        **options,
    )
    step.backward(train, meta)
    gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    return [*gradients, *model.buffers(), *reweighter.parameters(), torch.get_rng_state()]
