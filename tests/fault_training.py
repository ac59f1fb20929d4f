"""A training whose ranks can be lost, in a process or under torchrun; see test_faults.py."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from cases import Batch, make_batch, make_model
from ranks import process_group
from reweight import MetaReweightStep, SampleReweighter

NUM_STEPS = 6
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": fully_shard,
}
COLLECTIVES = ["all_reduce", "all_gather"]
# FSDP's own, which have other names in older PyTorch.
COLLECTIVES += ["all_gather_single", "all_gather_into_tensor"]
COLLECTIVES += ["reduce_scatter_single", "reduce_scatter_tensor"]


def make_step(kind: str = "DistributedDataParallel") -> MetaReweightStep:
    torch.manual_seed(3)
    model = KINDS[kind](make_model("mlp"))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MetaReweightStep(model, optimizer, SampleReweighter(3, num_hidden=4).double())


def batches(index: int) -> tuple[Batch, Batch]:
    """Of this rank; the last train batch is uneven."""
    rank = dist.get_rank()
    size = 2 + 3 * rank if index == NUM_STEPS - 1 else 4
    return make_batch("mlp", size, seed=10 * index + rank), make_batch("mlp", 3, seed=99 - rank)


def watch(step: MetaReweightStep, event: Callable[[], None]) -> None:
    """Call this around every collective, also DDP's and FSDP's, and before forwards and updates."""

    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        event()
        result = function(*args, **kwargs)
        event()
        return result

    for name in filter(partial(hasattr, dist), COLLECTIVES):
        setattr(dist, name, partial(around, getattr(dist, name)))
    inner = step.model
    if isinstance(step.model, DistributedDataParallel):
        inner = step.model.module
        # As a function: DDP looks at the names of its arguments.
        step.model.register_comm_hook(
            None, lambda state, bucket: around(allreduce_hook, state, bucket)
        )
    inner.register_forward_pre_hook(lambda *_: event())
    step.optimizers[0].register_step_pre_hook(lambda *_: event())


def train_until_lost(rank: int, kind: str, at: int, way: signal.Signals) -> int:
    """Rank 1 is lost at its at-th event; how many events there were in the first step."""
    events = 0

    def event() -> None:
        nonlocal events
        if rank == 1 and events == at:
            os.kill(os.getpid(), way)
        events += 1

    step = make_step(kind)
    watch(step, event)
    step(*batches(0))
    events_of_a_step = events
    step(*batches(1))
    return events_of_a_step


def train_without_meta_samples(rank: int) -> None:
    """Of two ranks one has none."""
    train, (inputs, target) = batches(0)
    make_step()(train, (inputs[: 3 * rank], target[: 3 * rank]))


def train_with_restarts(rank: int, folder: str) -> None:
    """Train from the last checkpoint on; in its first life, rank 1 is killed in the fourth step."""
    step, path = make_step(), Path(folder, "checkpoint.pt")
    parts = {"model": step.model, "optimizer": step.optimizers[0], "step": step}
    begin = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        begin = saved["num_steps"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for index in range(begin, NUM_STEPS):
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and index == 3 and rank == 1:
            watch(step, partial(os.kill, os.getpid(), signal.SIGKILL))
        step(*batches(index))
        if rank == 0 and index % 2 == 1:
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**saved, "num_steps": index + 1}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    Path(folder, f"began {rank}").write_text(str(begin))


def reported(
    rank: int, folder: str, seconds: float, function: Callable[..., Any], *args: Any
) -> None:
    """Run the function in a group of two; its result, or the error that ends it, to a file."""
    with process_group(rank, 2, f"file://{folder}/store", seconds):
        try:
            result = function(rank, *args)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        Path(folder, str(rank)).write_text(str(result))


if __name__ == "__main__":
    with process_group(int(os.environ["RANK"]), 2, "env://"):
        train_with_restarts(dist.get_rank(), sys.argv[1])
