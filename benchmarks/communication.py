"""What a reweighted step costs on several processes: measured on two, counted, and projected.

Measured: two processes of one thread each on this machine, joined by gloo, against plain
DistributedDataParallel on the same batches; and the same steps in two processes that do not talk.
All take turns, as in ``step_cost.py``.

Projected: with the ring all-reduce, S bytes on n processes over links of W bytes a second and a
latency of α take

    A(S) = 2·(n − 1)/n · S/W + 2·(n − 1)·α

    plain step       C + max(0, A(P) − 2/3·C)        DDP's own, under the backward
    reweighted step  r·C + m·A(P) + 6·2·log2(n)·α + max(0, A(P) − 2/3·C)

C is the time a plain step computes and P the gradient of the model in bytes; r = 3.33 and m = 2 for
the exact step, 2.67 and 1 for the lagged one. The m all-reduces cannot be overlapped: what follows
them needs all of what they bring. The six other calls (the reweighter's gradient, confidences,
counts, numbers to report) are of kilobytes and go by trees: their latency is all that they cost.
An interval divides by its length all of this that is more than a plain step.

    python benchmarks/communication.py               # about four minutes on two cores
    python benchmarks/communication.py --project     # the projection alone
"""

import argparse
import datetime
import math
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contestants import plain
from measure import median_ratios, seconds_by_turns
from nets import NETS, OPTIMIZERS
from reweight import MetaReweightStep, SampleReweighter

MODES: dict[str, dict[str, Any]] = {"exact": {}, "lagged": {"lagged": True}}
PROJECTIONS = {
    "exact": (10 / 3, 2, 1),
    "lagged": (8 / 3, 1, 1),
    "exact, interval 10": (10 / 3, 2, 10),
}
MODELS = {  # parameters, and seconds that a plain step computes: assumed, for the order of it
    "ResNet-50": (25.6e6, 0.1),
    "ViT-L": (304e6, 0.4),
    "1.3 B decoder": (1.3e9, 1.0),
}
BANDWIDTHS = (200e9, 50e9, 3e9)
LATENCY = 5e-6
NUM_GPUS = (8, 64, 256, 1024)


def all_reduce_seconds(size: float, num_gpus: int, bandwidth: float) -> float:
    """A(S) above."""
    hops = 2 * (num_gpus - 1)
    return hops / num_gpus * size / bandwidth + hops * LATENCY


def projected(mode: str, size: float, seconds: float, num_gpus: int, bandwidth: float) -> float:
    """Time of a step over that of a plain one."""
    compute, num_reduces, interval = PROJECTIONS[mode]
    model = all_reduce_seconds(size, num_gpus, bandwidth)
    plain_step = seconds + max(0.0, model - 2 / 3 * seconds)
    small = 6 * 2 * math.log2(num_gpus) * LATENCY
    more = (compute - 1) * seconds + num_reduces * model + small
    return 1 + more / interval / plain_step


def print_projection() -> None:
    """One block for each mode, one row for each model and bandwidth."""
    print("Projected: time of a reweighted step over that of a plain one on as many GPUs")
    print("  plain = C + max(0, A(P) − 2/3·C), A(S) = 2·(n − 1)/n · S/W + 2·(n − 1)·α, α = 5 µs")
    print("  ratio = 1 + ((r − 1)·C + m·A(P) + 6·2·log2(n)·α) / (interval · plain)")
    print("  P: float32; W: of the link of each GPU; C: assumed, ", end="")
    print(", ".join(f"{name} {seconds} s" for name, (_, seconds) in MODELS.items()))
    for mode, (compute, num_reduces, _) in PROJECTIONS.items():
        print(f"\n{mode}: r = {compute:.2f}, m = {num_reduces}")
        print(f"{'GPUs':>25}" + "".join(f"{n:>8}" for n in NUM_GPUS))
        for name, (num_parameters, seconds) in MODELS.items():
            for bandwidth in BANDWIDTHS:
                ratios = [
                    projected(mode, 4 * num_parameters, seconds, n, bandwidth) for n in NUM_GPUS
                ]
                print(f"{name:>14} {bandwidth / 1e9:>5.0f} GB/s", end="")
                print("".join(f"{ratio:>8.2f}" for ratio in ratios))


def steps_of(net_name: str, optimizer_name: str, *, wrapped: bool) -> dict[str, Any]:
    """Steps on half of the net's batch, by name, each with a model of its own."""
    net, steps = NETS[net_name], {}
    for name in ("plain", *MODES):
        torch.manual_seed(0)
        model: nn.Module = net.build()
        if wrapped:
            model = DistributedDataParallel(model)
        optimizer, g = OPTIMIZERS[optimizer_name](model), SampleReweighter(net.num_exits)
        g_optimizer = torch.optim.Adam(g.parameters(), 1e-4)
        options: Any = MODES.get(name)
        if options is None:
            step: Any = plain(model, optimizer, g, g_optimizer)
        else:
            step = MetaReweightStep(
                model, optimizer, g, reweighter_optimizer=g_optimizer, **options
            )
        train, meta = ([t[: len(t) // 2] for t in net.batch()] for _ in range(2))
        steps[name] = partial(step, train, meta)
    return steps


def counted(step: Any) -> tuple[Counter[str], float]:
    """Calls and bytes of the step's own collectives, and the seconds in them."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    seconds = 0.0

    def noted(name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        given = args[0] if name == "all_reduce" else args[1]
        sent["calls"] += 1
        sent["bytes"] += given.numel() * given.element_size()
        start = time.perf_counter()
        result = originals[name](*args, **kwargs)
        seconds += time.perf_counter() - start
        return result

    for name in originals:
        setattr(dist, name, partial(noted, name))
    step()
    for name, original in originals.items():
        setattr(dist, name, original)
    return sent, seconds


def measure(rank: int, folder: str, nets: list[str], optimizer: str, num_rounds: int) -> None:
    """One of two processes; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=300),
    )
    for net in nets:
        steps = steps_of(net, optimizer, wrapped=True)
        # Both processes draw the same order, and each collective keeps them together.
        joined = seconds_by_turns({n: (step, 1) for n, step in steps.items()}, num_rounds)
        traffic = {name: counted(step) for name, step in steps.items()}
        dist.barrier()
        # Alone, but both at the same time: the memory is shared as it was before.
        steps = steps_of(net, optimizer, wrapped=False)
        alone = seconds_by_turns({n: (step, 1) for n, step in steps.items()}, num_rounds)
        if rank:
            continue
        size = 4 * sum(p.numel() for p in NETS[net].build().parameters())
        print(f"{net}, {optimizer}, {size / 1e6:.2f} MB of gradient")
        ratios, ratios_alone = (median_ratios(seconds, "plain") for seconds in (joined, alone))
        for name in steps:
            sent, seconds = traffic[name]
            print(
                f"  {name:<8} {ratios[name]:>8.2f} {ratios_alone[name]:>10.2f} "
                f"{sent['calls']:>10} {sent['bytes'] / size:>8.3f} {1e3 * seconds:>8.0f} "
                f"{1e3 * statistics.median(joined[name]):>8.0f}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Measure on two processes, then project."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", action="store_true", help="the projection alone")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["conv", "vit"])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    if not settings.project:
        print(f"PyTorch {torch.__version__}, two processes of one thread, gloo; plain step = 1")
        print(
            "own calls: those of the step itself, besides DDP's all-reduce of the gradient; bytes:"
        )
        print(
            "theirs over those of the gradient; ms: in them, waiting for the other included, of a"
        )
        print("whole step")
        headings = f"{'':<10} {'with DDP':>8} {'without':>10} {'own calls':>10} {'bytes':>8}"
        print(f"{headings} {'ms':>8} {'of ms':>8}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            arguments = folder, settings.nets, settings.optimizer, settings.rounds
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=measure, args=(r, *arguments)) for r in range(2)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        print()
    print_projection()


if __name__ == "__main__":
    main()
