"""PyTorch's optimizers: ``optim_db``, every set of options by every implementation."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from databases.called import NUM_CLASSES
from databases.judge import Case
from databases.oracles import NUM_SAMPLES, Build, Expected, Training, by_differences

WIDTH, NUM_WARM_UP_STEPS = 4, 3
BAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""What differences of the objective are good for; of float32 they are those of float64, and of
bfloat16 they are good to its rounding, 0.4 %, and what that adds up to over a step."""


class Options(NamedTuple):
    """An optimizer and what it is made with."""

    info: Any
    options: dict[str, Any]


def entries() -> Mapping[str, Options]:
    """Class, options and implementation, by name."""
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        ways = ["foreach"] if "foreach" in info.supported_impls else []
        ways += ["fused"] if "cpu" in info.supports_fused_on else []
        for made in info.optim_inputs_func("cpu"):
            name = f"{info.optim_cls.__name__}, {made.desc}"
            found[name] = Options(info, made.kwargs)
            for way in ways:
                found[f"{name}, {way}"] = Options(info, {**made.kwargs, way: True})
    return found


def cases(entry: Options, dtype: torch.dtype) -> Iterator[Case]:
    """A small net after a few steps."""
    yield Case("warm", partial(_training, entry), unrounded, BAR)


def unrounded(build: Build, dtype: torch.dtype, weights: Tensor) -> Expected:
    """By differences, of the step in float64 where the class asks for bfloat16.

    Differences of a step that is rounded to 8 bits say nothing. The step itself looks ahead to the
    rounded parameters, as training does, and the meta loss has another gradient there: so where a
    class asks for bfloat16, that is the precision that the hypergradient is known in.
    """
    asked = []

    def bfloat16(tensor: Tensor) -> Tensor:
        asked.append(True)
        return tensor

    with mock.patch.object(torch.Tensor, "bfloat16", bfloat16):
        expected = by_differences(build, dtype, weights)
    return expected._replace(precision=torch.bfloat16) if asked else expected


def _training(entry: Options, dtype: torch.dtype) -> Training:
    embedded = entry.info.only_supports_sparse_grads
    first = nn.Embedding(5, WIDTH, sparse=True) if embedded else nn.Linear(WIDTH, WIDTH, bias=False)
    # Muon takes matrices alone.
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(WIDTH, NUM_CLASSES, bias=False)).to(dtype)
    parameters = first.parameters() if embedded else model.parameters()
    optimizer = entry.info.optim_cls(parameters, **copy.deepcopy(entry.options))
    batches = []
    for _ in range(NUM_WARM_UP_STEPS + 2):
        x = torch.randn(NUM_SAMPLES, WIDTH, dtype=torch.float64).to(dtype)
        if embedded:
            x = torch.randint(5, (NUM_SAMPLES,))
        batches.append((x, torch.randint(NUM_CLASSES, (NUM_SAMPLES,))))
    training = Training(model, optimizer, *batches[:2])
    for batch in batches[2:]:

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = training.losses(batch).mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure) if entry.info.step_requires_closure else optimizer.step()
    optimizer.zero_grad()
    return training
