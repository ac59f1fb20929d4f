"""What a step costs on a device, in plain steps: ours and the peers', eager and compiled."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from card.timing import medians_by_turns, peak_bytes
from contestants import CONTESTANTS, UNSUPPORTED
from msdnet import MSDNet
from nets import OPTIMIZERS, TINY_NETS, Batch, LanguageModel, Net, ViT, images, texts
from peers import PEERS
from reweight import SampleReweighter
from small import MultiExitConvNet

Row = dict[str, Any]

CARD_NETS = {  # as large as one trains them on a card
    "conv": Net(lambda: MultiExitConvNet((3, 32, 32), 10, 5, 64), 5, partial(images, 1024)),
    "msdnet": Net(lambda: MSDNet(100), 5, partial(images, 512, 100)),
    "vit": Net(lambda: ViT(384, 12), 6, partial(images, 512)),
    "lm": Net(lambda: LanguageModel(32000, 256, 512, 8), 4, partial(texts, 16, 32000, 256)),
}
OURS = [f"ours, {mode}" for mode in ("forward", "lean", "lagged", "interval 10")]


def cost(
    device: str,
    name: str,
    net: Net,
    optimizer_name: str,
    contestants: list[str],
    dtype: torch.dtype | None,
    compiled: bool,
    limit: float,
) -> Row:
    """Time and memory of each contestant over the plain step's, in one run."""
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    errors: dict[str, str] = {}
    batches = [placed(net.batch(), device) for _ in range(2)]
    for contestant in contestants:
        step = step_of(device, net, optimizer_name, contestant, batches, dtype, compiled)
        calls = 10 if contestant == "ours, interval 10" else 1
        try:
            for _ in range(3):
                step()
            memory[contestant] = peak_bytes(step, device)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            errors[contestant] = f"{type(error).__name__}: {error}"[:200]
            continue
        steps[contestant] = partial(repeat, step, calls)
    seconds = medians_by_turns(steps, device, limit)
    seconds = {c: s / (10 if c == "ours, interval 10" else 1) for c, s in seconds.items()}
    plain = seconds.pop("plain")
    row: Row = {
        "case": f"{name}, {optimizer_name}" + (", compiled" if compiled else ""),
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
        "outcome": "measured",
        "plain ms": plain * 1e3,
        **{contestant: each / plain for contestant, each in seconds.items()},
    }
    base = memory["plain"]
    if base:
        row["plain MiB"] = base / 2**20
        row |= {f"{c}, memory": m / base for c, m in memory.items() if m and c != "plain"}
    return {**row, **errors}


def step_of(
    device: str,
    net: Net,
    optimizer_name: str,
    contestant: str,
    batches: list[Batch],
    dtype: torch.dtype | None,
    compiled: bool,
) -> Callable[[], object]:
    """One step of it, with a model of its own."""
    torch.manual_seed(0)
    model: nn.Module = net.build().to(device)
    optimizer = OPTIMIZERS[optimizer_name](model)
    g = SampleReweighter(net.num_exits).to(device)
    g_optimizer = Adam(g.parameters(), lr=1e-4)
    if compiled:
        model = torch.compile(model)
    build = CONTESTANTS[contestant]
    step = build(model, optimizer, g, g_optimizer)

    def run() -> object:
        with torch.autocast(device, dtype) if dtype else nullcontext():
            return step(*batches)

    return run


def repeat(step: Callable[[], object], num_times: int) -> None:
    for _ in range(num_times):
        step()


def placed(batch: Batch, device: str) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def rows(device: str, tiny: bool) -> Iterator[Callable[[], Row]]:
    """The plain step, ours and the peers': float32 and bfloat16, then compiled."""
    nets = {"conv": TINY_NETS["conv"]} if tiny else CARD_NETS
    peers = [] if tiny else list(PEERS)
    limit = 0.1 if tiny else 3.0
    for dtype in [None] if tiny else [None, torch.bfloat16]:
        for name, net in nets.items():
            for optimizer_name in ["sgd"] if tiny or dtype else ["sgd", "adamw"]:
                known = [p for p in peers if (p, optimizer_name) not in UNSUPPORTED]
                chosen = ["plain", *(OURS[:1] if optimizer_name == "adamw" else OURS), *known]
                yield partial(cost, device, name, net, optimizer_name, chosen, dtype, False, limit)
    for name in [] if tiny else ["conv", "vit"]:
        net, chosen = nets[name], ["plain", "ours, forward"]
        yield partial(cost, device, name, net, "sgd", chosen, None, True, limit)
