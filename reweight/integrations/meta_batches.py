"""Meta batches for the Trainer of transformers: without an end, for each process, drawn apart."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reweight._passes.random_state import RandomState
from reweight.batches import describe


def meta_batches(meta: Iterable[Any], args: Any, start: int) -> Iterator[Any]:
    """Those of this process, without the first so many, by the Trainer's arguments.

    Of n processes each takes every n-th batch. The loader draws in a random state of its own: from
    the Trainer's, a run that goes on from a checkpoint would draw another order.
    """

    def batches() -> Iterator[Any]:
        while True:
            batch = None
            for batch in meta:
                yield batch
            if batch is None:
                raise ValueError(
                    "`meta` must begin anew each time it is gone through, as a DataLoader does, "
                    "got nothing."
                )

    rank, every = args.process_index, args.world_size
    drawn = _drawn_apart(batches(), args.seed, args.device)
    return itertools.islice(drawn, start * every + rank, None, every)


def _drawn_apart(batches: Iterator[Any], seed: int, device: torch.device) -> Iterator[Any]:
    outside = RandomState([device], [])
    random.seed(seed)
    np.random.seed(seed)
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    while True:
        try:
            batch = next(batches)
        finally:
            own = RandomState([device], [])
            outside.restore()
        yield batch
        outside = RandomState([device], [])
        own.restore()


def check_meta(batch: Any, labels: Tensor) -> None:
    """Raise TypeError unless a meta batch is like the Trainer's, with these labels."""
    wrong = None
    if not isinstance(batch, Mapping):
        wrong = describe(batch)
    elif not all(isinstance(value, Tensor) for value in batch.values()):
        wrong = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items())
    elif "labels" not in batch or batch["labels"].dim() != labels.dim():
        wrong = describe(batch)
    if wrong is not None:
        raise TypeError(
            "`meta` must yield batches as the Trainer's, dicts of tensors with `labels` of "
            f"{labels.dim()} dimensions, got {wrong}. Make a loader of a data set, "
            "DataLoader(meta_set, batch_size=8), with the Trainer's collator if it has one."
        )
