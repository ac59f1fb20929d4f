"""MSDNet on Fashion-MNIST at its published size, conventional and reweighted, while time lasts."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from card.timing import wait_for
from data import load_data
from msdnet import MSDNet
from reweight import (
    MetaReweightStep,
    SampleReweighter,
    anytime_accuracy,
    budgeted_curve,
    exit_costs,
)
from text_exits import Samples, evaluate

Row = dict[str, Any]

NUM_CLASSES, BATCH = 10, 128
PUBLISHED: dict[str, Any] = {"num_exits": 5}
TINY: dict[str, Any] = {"num_exits": 2, "channels": 4, "growth": 2}
ARMS = ("conventional", "reweighted")


class Arm:
    """One way to train, on batches of half the size beside as many meta samples, or on all."""

    def __init__(self, name: str, device: str, image: Tensor, size: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = MSDNet(NUM_CLASSES, in_channels=image.shape[0], **size).to(device)
        self.optimizer = SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        reweighter = SampleReweighter(size["num_exits"]).to(device)
        self.step = MetaReweightStep(self.model, self.optimizer, reweighter)
        self.name = name

    def epoch(self, train: Samples, seed: int) -> None:
        """Go through the data once, in halves that are each other's meta batch."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train.target), generator=generator).to(train.target.device)
        for rows in order.split(BATCH)[: len(order) // BATCH]:
            halves = [train.rows(half) for half in rows.chunk(2)]
            for now, meta in (halves, halves[::-1]):
                if self.name == "reweighted":
                    self.step(now, meta)
                    continue
                self.optimizer.zero_grad()
                logits = self.model(*now.inputs)
                torch.stack([F.cross_entropy(z, now.target) for z in logits]).sum().backward()
                self.optimizer.step()


def train(device: str, folder: Path | None, seconds: float, tiny: bool) -> Row:
    """Both arms for as many epochs as fit, the same number of each; the small run takes digits."""
    name, size = ("digits", TINY) if tiny else ("fashion-mnist", PUBLISHED)
    data = load_data(name, folder, train_size=128 if tiny else None)
    splits = {}
    for split in ("train", "calibration", "test"):
        images, target = (tensor.to(device) for tensor in getattr(data, split).tensors)
        if tiny:  # too small for the net's scales
            images, target = images[:128].repeat(1, 1, 4, 4), target[:128]
        splits[split] = Samples((images,), target)
    image = splits["train"].inputs[0][0]
    num_samples, took = len(splits["train"].target), {}
    for arm_name in ARMS:  # twice: the first chooses algorithms and loads kernels
        arm = Arm(arm_name, device, image, size)
        some = splits["train"].rows(torch.arange(min(20 * BATCH, num_samples), device=device))
        for _ in range(2):
            wait_for(device)
            start = time.perf_counter()
            arm.epoch(some, seed=0)
            wait_for(device)
            took[arm_name] = (time.perf_counter() - start) * num_samples / len(some.target)
    num_epochs = max(1, int(0.85 * seconds / sum(took.values())))
    row: Row = {
        "case": f"msdnet, {name}, {num_epochs} epochs",
        "outcome": "measured",
        "plain s an epoch": took["conventional"],
        "ours": took["reweighted"] / took["conventional"],
    }
    for arm_name in ARMS:
        arm = Arm(arm_name, device, image, size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(arm.optimizer, num_epochs)
        for seed in range(num_epochs):
            arm.epoch(splits["train"], seed)
            schedule.step()
        losses = {key: evaluate(arm.model, splits[key]) for key in ("calibration", "test")}
        costs = exit_costs(arm.model, image.unsqueeze(0), in_order=True)
        curve = budgeted_curve(losses["calibration"], losses["test"], costs)
        row[f"{arm_name}, exits"] = [round(float(a), 4) for a in anytime_accuracy(losses["test"])]
        row[f"{arm_name}, budgeted"] = sum(point.accuracy for point in curve) / len(curve)
    return row


def rows(device: str, tiny: bool, folder: Path | None) -> Iterator[Callable[[], Row]]:
    """One row, or none where the files are not to be found: they are never fetched."""
    yield partial(train, device, folder, 0.0 if tiny else 110.0, tiny)
