"""What the ranks of test_distributed.py run: each case on its shard, or one process on all."""

import contextlib
import datetime
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from cases import NUM_CLASSES, Batch, make_model
from references import allot_slowly
from reweight import (
    BudgetedObjective,
    ExitLosses,
    MeanObjective,
    MetaLoss,
    MetaReweightStep,
    SampleReweighter,
)

SHARDS = {1: [12], 2: [7, 5], 4: [2, 5, 1, 4]}  # the samples of each rank
META_SHARDS = {1: [9], 2: [3, 6], 4: [1, 2, 1, 5]}


def momentum(parameters) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """One training; what differs between the cases."""

    model: Callable[[], nn.Module] = lambda: make_model("mlp")
    optimizer: Callable[..., Optimizer] = momentum
    reweighter: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    num_exits: int = 3
    num_steps: int = 3
    num_parts: int = 1  # of a step's batch, accumulated
    no_sync: bool = True  # for all parts but the last
    set_to_none: bool = True
    inputs: Callable[[Tensor], Tensor] = lambda x: x
    ignored: bool = False
    just_call: bool = False
    just_update: bool = False


def shard(batch: Batch, sizes: list[int], rank: int | None) -> Batch:
    """The samples of one rank, or of all."""
    if rank is None:
        return batch
    start = sum(sizes[:rank])
    return tuple(tensor[start : start + sizes[rank]] for tensor in batch)


def make_joined_batch(num_samples: int, seed: int, case: Case) -> Batch:
    """The batch of all ranks together."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    if case.ignored:
        target[:4] = -100  # all of rank 0 of four, in train and in meta batches
        target[-3] = -100
    return case.inputs(inputs), target


def train(case: Case, rank: int | None, num_ranks: int) -> dict[str, Tensor]:
    """The training of one rank, or of one process alone; what came of it after every step."""
    torch.manual_seed(5)
    model = inner = case.model()
    if rank is not None:
        model = DistributedDataParallel(inner, **case.ddp)
    optimizer = case.optimizer(model.parameters())
    reweighter = SampleReweighter(case.num_exits, num_hidden=4, **case.reweighter).double()
    options = dict(case.options)
    if options.get("objective") is by_parts:
        options["objective"] = options["objective"](num_ranks if rank is None else None)
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter,
        reweighter_optimizer=SGD(reweighter.parameters(), lr=1.0),
        **options,
    )
    vectors, reports = [], []
    for index in range(case.num_steps):
        optimizer.zero_grad(set_to_none=case.set_to_none)
        for part in range(case.num_parts):
            seed = 10 * (case.num_parts * index + part)
            now = make_joined_batch(sum(SHARDS[num_ranks]), seed, case)
            meta = make_joined_batch(sum(META_SHARDS[num_ranks]), seed + 1, case)
            batches = (
                shard(now, SHARDS[num_ranks], rank),
                shard(meta, META_SHARDS[num_ranks], rank),
            )
            if case.just_call:
                result = step(*batches)
                continue
            if case.just_update:
                result = step.update_reweighter(*batches)
                continue
            last = part == case.num_parts - 1
            wait = rank is not None and case.no_sync and not last
            with model.no_sync() if wait else contextlib.nullcontext():
                result = step.backward(*batches, scale=1 / case.num_parts)
        if not case.just_call:
            if step.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(inner.parameters(), step.clip_grad_norm)
            optimizer.step()
        vectors.append(torch.cat([p.detach().flatten() for p in inner.parameters()]))
        vectors.append(torch.cat([p.detach().flatten() for p in reweighter.parameters()]))
        if result.meta_loss is not None:
            reports += [result.meta_loss.view(1), result.hypergradient_norm.view(1)]
            reports.append(result.exit_shares)
    return {"vectors": torch.cat(vectors), "reports": torch.cat(reports)}


class Routed(nn.Module):
    """A layer that only some samples take: a rank that has none of them leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side = nn.Linear(6, 6), nn.Linear(6, 6)
        self.exits = nn.ModuleList(nn.Linear(6, NUM_CLASSES) for _ in range(3))
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        taken = x[:, 0] > 0.3
        h = self.body(x).tanh()
        if taken.any():
            h = torch.where(taken.unsqueeze(1), self.side(h).tanh(), h)
        return [head(h) for head in self.exits]


def routed() -> nn.Module:
    return Routed().double()


def one_exit() -> nn.Module:
    return make_model("mlp", num_exits=1)


def by_parts(num_ranks: int | None) -> Any:
    """BudgetedObjective(per_rank=True), or what it comes to for one process with all samples."""
    if num_ranks is None:
        return BudgetedObjective(per_rank=True)

    def objective(meta: ExitLosses) -> MetaLoss:
        power = [0.75**k for k in range(3)]
        shares = [p / sum(power) for p in power]
        exits: list[int | None] = []
        start = 0
        for size in META_SHARDS[num_ranks]:
            rows = slice(start, start + size)
            exits += allot_slowly(meta.confidence[rows], shares, meta.valid[rows].tolist())
            start += size
        members = torch.tensor([[exit == k for k in range(3)] for exit in exits])
        counts = members.sum(0)
        value = (torch.where(members, meta.losses, 0).sum(0) / counts.clamp(min=1)).sum()
        return MetaLoss(value, counts / counts.sum().double())

    return objective


MEAN = {"objective": MeanObjective()}
BUCKETS = {"gradient_as_bucket_view": True}

CASES = {
    "budgeted": Case(),
    "budgeted, AdamW": Case(optimizer=adamw),
    "mean": Case(options=MEAN),
    "allotment by each rank": Case(options={"objective": by_parts}),
    "ignored samples": Case(ignored=True),
    "ignored samples, mean": Case(ignored=True, options=MEAN),
    "ignored samples, over the samples": Case(ignored=True, reweighter={"average_over": "samples"}),
    "sigmoid": Case(reweighter={"form": "sigmoid"}, ignored=True, optimizer=adamw),
    "sigmoid over both": Case(reweighter={"form": "sigmoid", "average_over": "both"}),
    "tanh over both": Case(reweighter={"average_over": "both", "inputs": "both"}),
    "one exit": Case(model=one_exit, num_exits=1, options=MEAN),
    "unrolled": Case(options={"estimator": "unrolled"}, optimizer=adamw),
    "finite differences": Case(options={"estimator": "finite_difference"}),
    "lean": Case(options={"lean": True}),
    "lagged": Case(options={"lagged": True}, optimizer=adamw),
    "lagged, lean": Case(options={"lagged": True, "lean": True}),
    "interval": Case(options={"interval": 2}, num_steps=4),
    "moves": Case(options={"moves": lambda name: name.startswith("exits")}),
    "clipped": Case(options={"clip_grad_norm": 0.5, "clip_hypergradient": 0.01}),
    "clipped by the call": Case(options={"clip_grad_norm": 0.5}, just_call=True),
    "update_reweighter": Case(just_update=True),
    "scaler": Case(
        options={"scaler": torch.amp.GradScaler("cpu", init_scale=1.0)}, optimizer=adamw
    ),
    "accumulation": Case(num_parts=3),
    "accumulation, AdamW, bucket views": Case(num_parts=2, optimizer=adamw, ddp=BUCKETS),
    "accumulation without no_sync": Case(num_parts=2, no_sync=False),
    "lagged accumulation": Case(num_parts=3, options={"lagged": True}),
    "lagged accumulation without no_sync": Case(
        num_parts=2, no_sync=False, options={"lagged": True}
    ),
    "bucket views": Case(ddp=BUCKETS),
    "bucket views, kept": Case(ddp=BUCKETS, set_to_none=False),
    "bucket views, kept, lagged": Case(ddp=BUCKETS, set_to_none=False, options={"lagged": True}),
    "unused parameters": Case(model=routed, ddp={"find_unused_parameters": True}, optimizer=adamw),
    "unused parameters, lean": Case(
        model=routed, ddp={"find_unused_parameters": True}, options={"lean": True}
    ),
    "unused parameters, lagged": Case(
        model=routed, ddp={"find_unused_parameters": True}, options={"lagged": True}
    ),
    "unused parameters, accumulation": Case(
        model=routed, ddp={"find_unused_parameters": True}, num_parts=2
    ),
    "static graph": Case(ddp={"static_graph": True}),
    "static graph, lean": Case(ddp={"static_graph": True}, options={"lean": True}),
    "static graph, lagged": Case(ddp={"static_graph": True}, options={"lagged": True}),
    "static graph, interval": Case(
        ddp={"static_graph": True}, options={"interval": 2}, num_steps=4
    ),
    "static graph, bucket views": Case(ddp={"static_graph": True, **BUCKETS}),
}


def run(rank: int, num_ranks: int, folder: str) -> None:
    """All cases on one rank; what came of them, or the error that ended it, goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{num_ranks}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    try:
        for name, case in CASES.items():
            results[name] = train(case, rank, num_ranks)
    except BaseException:
        results[name] = traceback.format_exc()
    torch.save(results, Path(folder, f"{num_ranks}-{rank}.pt"))
    dist.destroy_process_group()
