"""What the ranks of test_collectives.py run: each case on its shard, or one process on all."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from cases import NUM_CLASSES, Batch, make_batch, make_model
from ranks import attempt, process_group
from references import allot_slowly
from reweight import (
    BudgetedObjective,
    DirectWeights,
    ExitLosses,
    MeanObjective,
    MetaLoss,
    MetaReweightStep,
    SampleReweighter,
    exit_cross_entropy,
)
from reweight._ranks.collectives import num_ranks
from reweight._ranks.shards import parameters_of, whole

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
    wrap: Callable[[nn.Module], nn.Module] = lambda ddp: ddp
    direct: bool = False
    num_exits: int = 3
    num_steps: int = 3
    num_parts: int = 1  # of a step's batch, accumulated
    no_sync: bool = True  # for all parts but the last
    set_to_none: bool = True
    inputs: Callable[[Tensor], Tensor] = lambda x: x
    ignored: bool = False
    just_call: bool = False
    just_update: bool = False
    meta: bool = True


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


def train(
    case: Case,
    rank: int | None,
    num_ranks: int,
    group: Any = None,
    parallel: Callable[[nn.Module], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """The training of one rank, or of one process alone; what came of it after every step."""
    torch.manual_seed(5)
    model = inner = case.model()
    if rank is not None and parallel is not None:
        model = parallel(inner)
    elif rank is not None:
        model = case.wrap(DistributedDataParallel(inner, process_group=group, **case.ddp))
    optimizer = case.optimizer(model.parameters())
    options = dict(case.options)
    reweighter = DirectWeights(case.num_exits) if case.direct else None
    if reweighter is None:
        reweighter = SampleReweighter(case.num_exits, num_hidden=4, **case.reweighter).double()
        options["reweighter_optimizer"] = SGD(reweighter.parameters(), lr=1.0)
    if options.get("objective") is by_parts:
        options["objective"] = options["objective"](num_ranks if rank is None else None)
    step = MetaReweightStep(
        model,
        optimizer,
        reweighter,
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
                shard(meta, META_SHARDS[num_ranks], rank) if case.meta else None,
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
            if step._lookahead.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(inner.parameters(), step._lookahead.clip_grad_norm)
            optimizer.step()
        vectors.append(
            torch.cat([whole(p).detach().flatten() for p in parameters_of(inner).values()])
        )
        vectors += [p.detach().flatten() for p in reweighter.parameters()]
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


def of_ones_own(logits: list[Tensor], target: Tensor) -> ExitLosses:
    """Weights, missing labels and an auxiliary loss, whose mean over ranks is that of the whole."""
    losses = exit_cross_entropy(logits, target)
    return losses._replace(
        weight=losses.labels.clamp(min=0) + 1.0,
        valid=torch.stack([(target != -100) & (target != k) for k in range(3)], 1),
        auxiliary=num_ranks() * 0.01 * logits[0].square().sum(),
    )


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
    "labels and features": Case(
        reweighter={"form": "sigmoid", "num_classes": NUM_CLASSES, "num_features": 1},
        options={"features": lambda inputs, target: inputs[:, :1]},
        ignored=True,
    ),
    "weights of one's own": Case(ignored=True, options={"loss": of_ones_own}),
    "weights of one's own, sigmoid, lagged": Case(
        reweighter={"form": "sigmoid"}, options={"loss": of_ones_own, "lagged": True}
    ),
    "weights of one's own, direct": Case(
        direct=True, options={"loss": of_ones_own}, optimizer=adamw, num_parts=2
    ),
    "direct weights": Case(direct=True, ignored=True),
    "direct weights, AdamW, accumulation": Case(direct=True, optimizer=adamw, num_parts=2),
    "direct weights, unused parameters": Case(
        direct=True, model=routed, ddp={"find_unused_parameters": True}, optimizer=adamw
    ),
    "one exit": Case(model=one_exit, num_exits=1, options=MEAN),
    "unrolled": Case(options={"estimator": "unrolled"}, optimizer=adamw),
    "finite differences": Case(options={"estimator": "finite_difference"}),
    "lean": Case(options={"lean": True}),
    "lagged": Case(options={"lagged": True}, optimizer=adamw),
    "lagged, lean": Case(options={"lagged": True, "lean": True}),
    "lagged, next train batch as meta batch": Case(options={"lagged": True}, meta=False),
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
    "compiled": Case(wrap=lambda ddp: torch.compile(ddp, backend="eager")),
    "static graph, bucket views": Case(ddp={"static_graph": True, **BUCKETS}),
}


def make_step(group: Any, model: nn.Module | None = None, **options: Any) -> MetaReweightStep:
    """The step of a rank, with four samples of its own."""
    torch.manual_seed(3)
    model = model or make_model("mlp")
    if group is not None:
        model = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    reweighter = options.pop("reweighter", None) or SampleReweighter(3, num_hidden=4).double()
    own = SGD(reweighter.parameters(), lr=1.0)
    optimizer = adamw(model.parameters())
    return MetaReweightStep(model, optimizer, reweighter, reweighter_optimizer=own, **options)


def own_batches(model_name: str = "mlp", seed: int = 0) -> tuple[Batch, Batch]:
    rank = dist.get_rank()
    return tuple(make_batch(model_name, 4, seed=100 * seed + 10 * rank + i) for i in (0, 1))


def vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=words):
        call()


def ranks_stay_bitwise_equal(group: Any) -> None:
    step = make_step(group, make_model("conv_batch_norm"))
    before = vector(step.model)
    for seed in range(20):
        step(*own_batches("conv_batch_norm", seed))
    for module in (step.model, step.reweighter):
        every = gathered(vector(module), group)
        assert all(torch.equal(each, every[0]) for each in every)
    assert (before - vector(step.model)).abs().max() > 0.01


def gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor, group)
    return every


def ranks_that_differ_are_refused(group: Any) -> None:
    odd = dist.get_rank() % 2

    def reweighter(seed: int = 0, num_exits: int = 3) -> SampleReweighter:
        torch.manual_seed(seed)
        return SampleReweighter(num_exits, num_hidden=4).double()

    def make(**options: Any) -> None:
        make_step(group, **options)

    refused(ValueError, "the state of `reweighter`", lambda: make(reweighter=reweighter(seed=odd)))
    refused(
        ValueError, "`reweighter` must be the same", lambda: make(reweighter=reweighter(0, 3 + odd))
    )
    refused(ValueError, "the options of the step", lambda: make(interval=1 + odd))
    make(reweighter=reweighter())


def other_kinds_of_parallel_models_are_refused(group: Any) -> None:
    def make(model: nn.Module) -> None:
        MetaReweightStep(model, momentum(model.parameters()), SampleReweighter(3))

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = make_model("mlp")
    parallelize_module(split, mesh, {"exits.0": ColwiseParallel()})
    refused(TypeError, "exits.0.weight as an exception.* wrap the whole model", lambda: make(split))
    part = DistributedDataParallel(make_model("mlp"))
    refused(TypeError, "must not hold Distributed", lambda: make(nn.Sequential(part, nn.Tanh())))
    step = make_step(group)
    refused(
        TypeError,
        "`reweighter` must be bare",
        lambda: make_step(group, reweighter=DistributedDataParallel(step.reweighter)),
    )


def what_is_not_finite_on_one_rank_is_skipped_by_all(group: Any) -> None:
    step = make_step(group)
    step(*own_batches())  # so that AdamW has a state
    train_batch, meta = own_batches()
    for which in (0, 1):
        batches = [[x.clone(), y] for x, y in (train_batch, meta)]
        if dist.get_rank() == 1:
            batches[which][0][0, 0] = torch.nan
        before = vector(step.reweighter)
        result = step.update_reweighter(*batches)
        assert bool(result.nonfinite[which])
        assert torch.equal(before, vector(step.reweighter))
        assert int(step.num_skipped) == which + 1
    step.update_reweighter(train_batch, meta)
    assert not torch.equal(before, vector(step.reweighter))
    assert int(step.num_skipped) == 2


class Drifting(nn.Module):
    """Reads a buffer and moves it: each rank begins with that of rank 0 and leaves with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("mlp")
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.inner(x * self.factor.clone())
        self.factor.add_(x.detach().mean())
        return outputs


def replays_begin_with_the_buffers_of_the_forward(group: Any) -> None:
    steps = [
        make_step(group, Drifting(), **options)
        for options in ({"estimator": "unrolled"}, {}, {"lean": True})
    ]
    for seed in range(3):
        for step in steps:
            step(*own_batches(seed=seed))
    for step in steps[1:]:
        for ours, theirs in zip(step.model.buffers(), steps[0].model.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for name in ("model", "reweighter"):
            ours, theirs = vector(getattr(step, name)), vector(getattr(steps[0], name))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that the step calls, with the bytes each rank gives; not DDP's own."""
    calls, plain = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def count(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if name == "all_reduce" else args[1]
            calls.append((name, given.numel() * given.element_size()))
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(dist, name, count(name))
    try:
        yield calls
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def what_is_sent_is_what_the_documentation_says(group: Any) -> None:
    size = 8 * len(vector(make_model("mlp")))
    own = 8 * len(vector(make_step(group).reweighter))
    flags = 8  # for each tensor of the model or reweighter: whether this rank has a gradient
    num_tensors = len(list(make_model("mlp").parameters()))
    allotment, numbers = [("all_gather", 8), ("all_gather", 4 * 4 * 8)], ("all_gather", 7 * 8)
    gradient = ("all_reduce", size + flags * num_tensors)
    meta_gradient, reweighter = ("all_reduce", size), ("all_reduce", own + flags * 4)
    count, counts = ("all_reduce", 8), ("all_reduce", 3 * 8)
    for options, expected in (
        ({}, [count, gradient, *allotment, counts, meta_gradient, numbers, reweighter]),
        ({"lagged": True}, [count, *allotment, counts, meta_gradient, numbers, reweighter]),
        (
            {"objective": MeanObjective()},
            [count, gradient, count, meta_gradient, numbers, reweighter],
        ),
        (
            {"objective": BudgetedObjective(per_rank=True)},
            [count, gradient, counts, meta_gradient, numbers, reweighter],
        ),
    ):
        step = make_step(group, **options)
        with counted() as calls:
            step(*own_batches())
        assert calls == expected, options
    step._learner.interval = 2
    with counted() as calls:
        step(*own_batches())
    assert calls == [count]


def a_call_that_fails_changes_nothing(group: Any) -> None:
    for options in ({}, {"lagged": True}):
        step = make_step(group, Drifting(), **options)
        (inputs, target), meta = own_batches()
        step.backward((inputs, target), meta)
        before = [vector(step.reweighter), *step.model.buffers()]
        before += [p.grad for p in step.model.parameters()]
        before = [tensor.clone() for tensor in before]
        for one, other in (
            ((inputs, target), (meta[0], meta[1] + 100)),
            ((inputs, target + 100), meta),
        ):
            refused(ValueError, "`target` must lie in", partial(step.backward, one, other))
            after = [vector(step.reweighter), *step.model.buffers()]
            after += [p.grad for p in step.model.parameters()]
            assert all(map(torch.equal, before, after))
        step.backward((inputs, target), meta)


def a_fraction_of_the_rows_is_unbiased(group: Any) -> None:
    def change(step: MetaReweightStep) -> Tensor:
        before = vector(step.reweighter)
        step.update_reweighter(*own_batches())
        return vector(step.reweighter) - before

    by_row: dict[int, Tensor] = {}
    seed = 0
    while len(by_row) < 4:
        seed += 1
        drawn = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[0].item()
        if drawn not in by_row:
            step = make_step(group, train_fraction=0.25)
            step._learner.num_updates = seed
            by_row[drawn] = change(step)
    mean = torch.stack(list(by_row.values())).mean(0)
    torch.testing.assert_close(mean, change(make_step(group)), rtol=1e-9, atol=1e-12)


def a_model_that_is_not_wrapped_stays_local(group: Any) -> None:
    if dist.get_rank() != 0:
        return  # no other rank takes part
    step = make_step(None, reweighter=SampleReweighter(3, average_over="samples").double())
    result = step(*own_batches())
    step.reweighter(result.losses)


def outside_of_a_step_means_are_local(group: Any) -> None:
    torch.manual_seed(0)
    step = make_step(group, reweighter=SampleReweighter(3, average_over="samples").double())
    result = step(*own_batches())
    assert (result.weights.mean(0) - 1).abs().max() > 1e-6
    if dist.get_rank() == 0:
        weights = step.reweighter(result.losses)
        torch.testing.assert_close(weights.mean(0), torch.ones_like(weights[0]))
        own = result.losses.mean_over_samples(result.weights * result.losses.losses).sum()
        assert torch.equal(result.train_loss, own)


CHECKS = {
    check.__name__: check
    for check in (
        ranks_stay_bitwise_equal,
        ranks_that_differ_are_refused,
        other_kinds_of_parallel_models_are_refused,
        what_is_not_finite_on_one_rank_is_skipped_by_all,
        replays_begin_with_the_buffers_of_the_forward,
        what_is_sent_is_what_the_documentation_says,
        a_call_that_fails_changes_nothing,
        a_fraction_of_the_rows_is_unbiased,
        a_model_that_is_not_wrapped_stays_local,
        outside_of_a_step_means_are_local,
    )
}


def run(rank: int, folder: str) -> None:
    """Everything, on one of four ranks, in groups of one, two and four of them.

    What came of it goes to a file, by number of ranks and name; an error as text.
    """
    warnings.simplefilter("error")
    results: dict[tuple[int, str], Any] = {}
    with process_group(rank, 4, f"file://{folder}/store"):
        for num_ranks in (1, 2, 4):
            groups = [
                dist.new_group(list(range(first, first + num_ranks)))
                for first in range(0, 4, num_ranks)
            ]
            # Each group has its share of the cases.
            for name in list(CASES)[rank // num_ranks :: len(groups)]:
                group = groups[rank // num_ranks]
                results[num_ranks, name] = attempt(
                    train, CASES[name], dist.get_rank(group), num_ranks, group
                )
        for name, check in CHECKS.items():
            results[4, name] = attempt(check, dist.group.WORLD)
    torch.save(results, Path(folder, f"{rank}.pt"))
