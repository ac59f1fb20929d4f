"""What the ranks of test_shards.py run."""

from collections.abc import Callable
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import distributed_cases
from cases import UPDATE_RULES, Batch, LastToken, MultiExit, make_model
from distributed_cases import (
    META_SHARDS,
    SHARDS,
    Case,
    adamw,
    make_joined_batch,
    refused,
    shard,
    train,
)
from ranks import attempt, process_group
from reweight import MetaReweightStep, SampleReweighter
from reweight._ranks.shards import parameters_of, whole


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


# Of what DistributedDataParallel is held to, all that does something else with parameters or their
# gradients; these are accumulated as shards, without no_sync.
CASES = {
    name: distributed_cases.CASES[name]
    for name in (
        "budgeted",
        "ignored samples, over the samples",
        "finite differences",
        "lean",
        "lagged",
        "lagged, lean",
        "lagged, next train batch as meta batch",
        "interval",
        "moves",
        "clipped",
        "clipped by the call",
        "update_reweighter",
        "scaler",
        "accumulation without no_sync",
        "lagged accumulation without no_sync",
    )
}
CASES |= {  # every way in which an update is made: by each rule, by the stock class, with a tensor
    f"optimizer: {name}": Case(optimizer=by_rule(name), num_steps=2)
    for name in (
        "sgd_nesterov_two_groups",
        "sgd_maximize",
        "adam_fused",
        "adam_amsgrad",
        "adamw_tensor_lr",
        "rmsprop_centered_momentum",
        "adagrad_lr_decay",
        "adadelta",
        "radam_rectified",
        "adamax",
        "nadam",
        "asgd",
    )
    if name in UPDATE_RULES
}
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


class Fails(nn.Module):
    """Raises in its forward, or in the backward of it, at the call that is chosen."""

    where = ""

    def __init__(self) -> None:
        super().__init__()
        self.left = SimpleNamespace(calls=0)  # a step puts back numbers that the forward changes

    def forward(self, x: Tensor) -> Tensor:
        self.left.calls -= 1
        if self.left.calls != 0:
            return x
        if self.where == "forward":
            raise ArithmeticError
        x = x.clone()
        x.register_hook(self._fail)
        return x

    def _fail(self, gradient: Tensor) -> None:
        raise ArithmeticError


FAILURES = [
    ("forward", 1, False),
    ("forward", 2, False),
    ("forward", 3, False),
    ("forward", 3, True),
    ("backward", 1, False),
    ("backward", 2, False),
    ("backward", 2, True),
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
    fails.where, fails.left.calls = where, call
    if where:
        before = training.vector()
        try:
            training.run(1, rank, num_ranks)
        except ArithmeticError:
            assert torch.equal(training.vector(), before)
        else:
            raise AssertionError("did not fail")
    fails.left.calls = 0
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


ACCURACY = {  # the largest error that is allowed, about twice what was measured; see the docs
    ("float32", "forward"): 2e-6,
    ("float32", "finite_difference"): 2e-3,
    ("bfloat16", "forward"): 0.03,
    ("bfloat16", "finite_difference"): 0.15,
}


def error(rank: int, num_ranks: int, precision: str, estimator: str) -> float:
    """How far the reweighter's gradient is from exact, relative to its norm."""
    case = CASES["model: wide"]
    train, meta = (make_joined_batch(size, seed, case) for size, seed in ((12, 0), (9, 1)))
    torch.manual_seed(5)
    model = wide()
    exact = reweighter_gradient(model, train, meta)
    model.float()
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    blocks_and_rest(model, **({"mp_policy": bfloat16} if precision == "bfloat16" else {}))
    train, meta = (
        (inputs.float(), target)
        for inputs, target in (
            shard(train, SHARDS[num_ranks], rank),
            shard(meta, META_SHARDS[num_ranks], rank),
        )
    )
    found = reweighter_gradient(model, train, meta, estimator=estimator)
    return float((found - exact).norm() / exact.norm())


def reweighter_gradient(model: nn.Module, train: Batch, meta: Batch, **options: Any) -> Tensor:
    """What the first update of a reweighter goes along."""
    torch.manual_seed(3)
    reweighter = SampleReweighter(3, num_hidden=4).to(train[0].dtype)
    own, found = SGD(reweighter.parameters(), lr=1.0), []
    own.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in reweighter.parameters()]))
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    step = MetaReweightStep(model, optimizer, reweighter, reweighter_optimizer=own, **options)
    step.update_reweighter(train, meta)
    return found[0].double()


def what_does_not_fit_is_refused(rank: int, num_ranks: int) -> None:
    def make(model: nn.Module, reweighter: Any = None, **options: Any) -> MetaReweightStep:
        reweighter = reweighter or SampleReweighter(3, num_hidden=4).double()
        return MetaReweightStep(model, SGD(model.parameters(), lr=0.1), reweighter, **options)

    torch.manual_seed(3)
    part = make_model("mlp")
    fully_shard(part.blocks[0])
    refused(TypeError, "or none, got blocks.1.0.weight as an exc", lambda: make(part))
    mesh = init_device_mesh("cpu", (1, num_ranks), mesh_dim_names=("shard", "split"))
    split = make_model("mlp")
    parallelize_module(split, mesh["split"], {"exits.0": ColwiseParallel()})
    fully_shard(split, mesh=mesh["shard"])
    refused(TypeError, "over one mesh, or none, got", lambda: make(split))
    model = fully_shard(make_model("mlp"))
    refused(ValueError, "cannot be 'unrolled' with", lambda: make(model, estimator="unrolled"))
    reweighter = fully_shard(SampleReweighter(3).double())
    refused(TypeError, "`reweighter` must be bare", lambda: make(model, reweighter))
    training = Training(model, SGD(model.parameters(), lr=0.1))
    model.set_requires_gradient_sync(False)
    words = "must reduce its gradients in every backward"
    refused(ValueError, words, lambda: training.run(0, rank, num_ranks))
    model.set_requires_gradient_sync(True)
    training.run(0, rank, num_ranks)


def run(rank: int, num_ranks: int, folder: str) -> None:
    """Everything on one rank; what came of it goes to a file."""
    with process_group(rank, num_ranks, f"file://{folder}/store{num_ranks}"):
        results = {
            name: attempt(train, case, rank, num_ranks, None, wrap(name))
            for name, case in CASES.items()
        }
        for failure in [("", 0, False), ("", 0, True), *FAILURES]:
            results[failure] = attempt(recovered, rank, num_ranks, *failure)
        for kind in KINDS:
            results["save", kind] = attempt(save_checkpoint, folder, kind, rank, num_ranks)
            results["load", kind] = attempt(load_checkpoint, folder, kind, 1, rank, num_ranks)
        for precision, estimator in ACCURACY:
            results[precision, estimator] = attempt(error, rank, num_ranks, precision, estimator)
        results["refused"] = attempt(what_does_not_fit_is_refused, rank, num_ranks)
        torch.save(results, Path(folder, f"{rank}.pt"))
