"""PyTorch's modules: ``module_db``."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from databases.called import Called, training_of
from databases.judge import Case
from databases.ops import COMPLEX, spread
from databases.oracles import Training

FIXED_TARGET = ("nn.BCELoss", "nn.KLDivLoss", "nn.SoftMarginLoss")
"""Losses whose target has no derivative, or may not leave an interval."""


def entries() -> Mapping[str, Any]:
    """All of them, by name."""
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db}


def cases(info: Any, dtype: torch.dtype) -> Iterator[Case]:
    """A few of its samples, in training, and in evaluation where that is something else."""
    if dtype not in info.dtypes:
        dtype = COMPLEX[dtype]
    for training in (True, False) if info.train_and_eval_differ else (True,):
        torch.manual_seed(0)
        options = {"device": "cpu", "dtype": dtype, "requires_grad": False}
        samples = info.module_inputs_func(info, **options, training=training)
        for index in spread(len(samples)):
            name = f"sample {index} {samples[index].desc}, {'train' if training else 'eval'}"
            yield Case(name.strip(), partial(_training, info, samples[index], dtype, training))


def _training(
    info: Any, sample: Any, dtype: torch.dtype, training: bool, real: torch.dtype
) -> Training:
    made = copy.deepcopy((sample.constructor_input.args, sample.constructor_input.kwargs))
    module = info.module_cls(*made[0], **made[1]).to(dtype).train(training)

    def function(arguments: Any) -> Any:
        args, kwargs = arguments
        return module(*args, **kwargs)

    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    moved = args[:1] if info.name in FIXED_TARGET else (args, kwargs)
    chosen = {id(leaf) for leaf in tree_leaves(moved) if _is_number(leaf)}
    called = Called(function, (args, kwargs), lambda tensor: id(tensor) in chosen, module)
    return training_of(called, real)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
