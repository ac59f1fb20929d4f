"""What several tests assert."""

import torch
from torch.utils._pytree import tree_flatten


def assert_same(ours: object, theirs: object) -> None:
    """Bitwise the same, through dicts, lists and tuples."""
    leaves, others = tree_flatten(ours)[0], tree_flatten(theirs)[0]
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, other)
        else:
            assert leaf == other
