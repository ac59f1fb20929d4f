"""What the ranks of test_fsdp.py run."""

import contextlib
import datetime
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distributed_cases
from cases import UPDATE_RULES, LastToken, MultiExit, make_model
from distributed_cases import (
    META_SHARDS,
    SHARDS,
    Case,
    adamw,
    make_joined_batch,
    shard,
    train,
)
from reweight import MetaReweightStep, SampleReweighter
from reweight.shards import parameters_of, whole


def blocks_and_rest(model: nn.Module, **options: Any) -> nn.Module:
    """Every block is gathered by itself, the exits with the root."""
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def kept_after_forward(model: nn.Module) -> nn.Module:
    return blocks_and_rest(model, reshard_after_forward=False)


def exits_together(model: nn.Module) -> nn.Module:
    fully_shard(list(model.exits))
    return fully_shard(model)


def checkpointed(model: nn.Module) -> nn.Module:
    model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    return blocks_and_rest(model)


def no_root(model: nn.Module) -> nn.Module:
    for module in [*model.blocks, *model.exits]:
        fully_shard(module)
    return model


def two_dimensions(model: nn.Module) -> nn.Module:
    """Copies of shards: of the dimensions of the mesh one is for either."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("copy", "shard"))
    return blocks_and_rest(model, mesh=mesh)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the whole model": fully_shard,
    "kept after the forward": kept_after_forward,
    "exits together": exits_together,
    "checkpointed": checkpointed,
    "no root": no_root,
    "two dimensions": two_dimensions,
}


def wide(num_exits: int = 3) -> MultiExit:
    """Products so large that their values are kept for the forward-mode pass."""
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]
    return MultiExit(blocks, [LastToken(64) for _ in range(num_exits)]).double()


def by_rule(name: str) -> Callable[[Any], Any]:
    def optimizer(parameters: Any) -> Any:
        held = list(parameters)
        return UPDATE_RULES[name](SimpleNamespace(parameters=lambda: held))

    return optimizer


# What DistributedDataParallel is held to; gradients are accumulated as shards, without no_sync.
CASES = {
    name: case
    for name, case in distributed_cases.CASES.items()
    if not case.ddp
    and not (case.num_parts > 1 and case.no_sync)
    and case.options.get("estimator") != "unrolled"
}
CASES |= {f"optimizer: {name}": Case(optimizer=by_rule(name), num_steps=2) for name in UPDATE_RULES}
CASES |= {
    f"model: {name}": Case(model=lambda name=name: make_model(name), optimizer=adamw)
    for name in ("tied", "frozen_trunk")
}
CASES |= {
    "model: recurrent": Case(
        model=lambda: make_model("recurrent"),
        inputs=lambda x: torch.stack([x, x.sin(), x.cos()], 1)[:, :, :5],
    ),
    "model: wide": Case(
        model=wide,
        optimizer=adamw,
        inputs=lambda x: (x[:, :, None] * x[:, None, :]).repeat(1, 11, 11)[:, :64, :64],
    ),
}
CASES |= {f"wrap: {name}": Case(optimizer=adamw) for name in WRAPS}


def wrap(name: str) -> Callable[[nn.Module], nn.Module]:
    """How the model of this case is sharded; one whose blocks share a parameter as a whole."""
    return fully_shard if name == "model: tied" else WRAPS.get(name[6:], blocks_and_rest)


@contextlib.contextmanager
def process_group(rank: int, num_ranks: int, folder: str) -> Iterator[None]:
    """Ranks that meet in this folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{num_ranks}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class Fails(nn.Module):
    """Raises in its forward, or in the backward of it, at the call that is chosen."""

    where, calls = "", 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls != 0:
            return x
        if self.where == "forward":
            raise ArithmeticError
        x = x.clone()
        x.register_hook(self._fail)
        return x

    def _fail(self, gradient: Tensor) -> None:
        raise ArithmeticError


FAILURES = [
    (where, call, lagged)
    for where, call in [
        ("forward", 1),
        ("forward", 2),
        ("forward", 3),
        ("backward", 1),
        ("backward", 2),
    ]
    for lagged in (False, True)
]


def recovered(rank: int, num_ranks: int, where: str, call: int, lagged: bool) -> Tensor:
    """What a training comes to in which a step failed and was taken again."""
    torch.manual_seed(5)
    model = make_model("mlp")
    fails = Fails()
    model.blocks[1].append(fails)
    blocks_and_rest(model)
    training = Training(model, adamw(model.parameters()), lagged=lagged)
    training.run(0, rank, num_ranks)
    fails.where, fails.calls = where, call
    if where:
        before = training.vector()
        try:
            training.run(1, rank, num_ranks)
        except ArithmeticError:
            assert torch.equal(training.vector(), before)
        else:
            raise AssertionError("did not fail")
    fails.calls = 0
    training.run(1, rank, num_ranks)
    return training.vector()


class Training:
    """A model, its optimizer and its step, on a part of the batches of distributed_cases."""

    def __init__(self, model: nn.Module, optimizer: Any, **options: Any) -> None:
        self.model, self.optimizer = model, optimizer
        torch.manual_seed(3)
        self.reweighter = SampleReweighter(3, num_hidden=4).double()
        self.step = MetaReweightStep(model, optimizer, self.reweighter, **options)

    def run(self, index: int, rank: int, num_ranks: int) -> None:
        """One step, with the same joined batch on however many ranks."""
        train, meta = (
            make_joined_batch(size, 2 * index + i, Case()) for i, size in ((0, 12), (1, 9))
        )
        self.step(shard(train, SHARDS[num_ranks], rank), shard(meta, META_SHARDS[num_ranks], rank))

    def vector(self) -> Tensor:
        """All that is learnt."""
        parameters = [*parameters_of(self.model).values(), *self.reweighter.parameters()]
        return torch.cat([whole(parameter).detach().flatten() for parameter in parameters])


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fully_shard": blocks_and_rest,
    "DistributedDataParallel": DistributedDataParallel,
}


def save_checkpoint(folder: str, kind: str, rank: int, num_ranks: int) -> Tensor:
    """Train, save, train on: where that leads."""
    torch.manual_seed(5)
    model = KINDS[kind](make_model("mlp"))
    training = Training(model, adamw(model.parameters()))
    for index in range(2):
        training.run(index, rank, num_ranks)
    dcp.save(checkpoint_of(training), checkpoint_id=Path(folder, f"{kind} {num_ranks}"))
    return go_on(training, rank, num_ranks)


def load_checkpoint(folder: str, kind: str, saved: int, rank: int, num_ranks: int) -> Tensor:
    """The same from what another number of ranks has saved."""
    torch.manual_seed(99)
    model = KINDS[kind](make_model("mlp", seed=99))
    training = Training(model, adamw(model.parameters()))
    checkpoint = checkpoint_of(training)
    dcp.load(checkpoint, checkpoint_id=Path(folder, f"{kind} {saved}"))
    set_state_dict(
        model,
        training.optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
    )
    training.step.load_state_dict(checkpoint["step"][0])
    return go_on(training, rank, num_ranks)


def checkpoint_of(training: Training) -> dict[str, Any]:
    """A tuple is saved as it is; the state of a step that has yet to begin has fewer entries."""
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optimizer": optimizer, "step": (training.step.state_dict(),)}


def go_on(training: Training, rank: int, num_ranks: int) -> Tensor:
    for index in range(2, 4):
        training.run(index, rank, num_ranks)
    return training.vector()


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the error as text."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


def run(rank: int, num_ranks: int, folder: str) -> None:
    """Everything on one rank; what came of it goes to a file."""
    with process_group(rank, num_ranks, folder):
        results = {
            name: attempt(train, case, rank, num_ranks, None, wrap(name))
            for name, case in CASES.items()
        }
        for failure in [("", 0, False), ("", 0, True), *FAILURES]:
            results[failure] = attempt(recovered, rank, num_ranks, *failure)
        for kind in KINDS:
            results["save", kind] = attempt(save_checkpoint, folder, kind, rank, num_ranks)
            results["load", kind] = attempt(load_checkpoint, folder, kind, 1, rank, num_ranks)
        torch.save(results, Path(folder, f"{rank}.pt"))
