"""MSDNet on Fashion-MNIST at its published size, conventional and reweighted, while time lasts.

Both arms take as many steps as fit, in turns of a fifth, with a row after each: whatever is cut,
both have come equally far.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import SGD

from card.timing import Run, wait_for
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
TURNS = 5
SHARE = 0.85  # of the time that is left, to be planned for


class Arm:
    """One way to train, on halves of batches that are each other's meta batch."""

    def __init__(self, name: str, device: str, train: Samples, size: dict[str, Any]) -> None:
        torch.manual_seed(0)
        in_channels = train.inputs[0].shape[1]
        self.model = MSDNet(NUM_CLASSES, in_channels=in_channels, **size).to(device)
        self.optimizer = SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        reweighter = SampleReweighter(size["num_exits"]).to(device)
        self._step = MetaReweightStep(self.model, self.optimizer, reweighter)
        self._is_reweighted, self._pairs = name == "reweighted", pairs(train)

    def train(self, num_steps: int, schedule: Any = None) -> None:
        """Take so many steps, on the batches that come next."""
        self.model.train()
        for _ in range(num_steps):
            now, meta = next(self._pairs)
            if self._is_reweighted:
                self._step(now, meta)
            else:
                self.optimizer.zero_grad()
                logits = self.model(*now.inputs)
                torch.stack([F.cross_entropy(z, now.target) for z in logits]).sum().backward()
                self.optimizer.step()
            if schedule is not None:
                schedule.step()


def pairs(train: Samples) -> Iterator[tuple[Samples, Samples]]:
    """Half of a batch, and the other half to judge it; then the other way round. Without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(train.target), generator=generator).to(train.target.device)
        for rows in order.split(BATCH)[: len(order) // BATCH]:
            first, second = (train.rows(half) for half in rows.chunk(2))
            yield from ((first, second), (second, first))


class Training:
    """Both arms: first they are timed, then they train in turns.

    Attributes:
        num_turns: of each arm; 0 until they are timed.
    """

    def __init__(self, run: Run) -> None:
        self._run, self.num_turns = run, 0

    def prepare(self) -> Row:
        """Read the data, and find out how many steps of both fit."""
        run, device = self._run, self._run.device
        self._name, size = ("digits", TINY) if run.tiny else ("fashion-mnist", PUBLISHED)
        try:
            data = load_data(self._name, run.folder, train_size=256 if run.tiny else None)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Give --data-dir the folder of its files: {error}") from None
        self._splits = {}
        for split in ("train", "calibration", "test"):
            images, target = (tensor.to(device) for tensor in getattr(data, split).tensors)
            if run.tiny:  # too small for the net's scales
                images, target = images[:256].repeat(1, 1, 4, 4), target[:256]
            self._splits[split] = Samples((images,), target)
        train, num_steps = self._splits["train"], 1 if run.tiny else 20
        took = {}
        for name in ARMS:
            arm = Arm(name, device, train, size)
            arm.train(num_steps)  # chooses algorithms and loads kernels
            took[name] = seconds(partial(arm.train, num_steps), device) / num_steps
        took["evaluation"] = seconds(partial(evaluate, arm.model, self._splits["test"]), device)
        left = SHARE * run.seconds_left() - 2 * (TURNS + 1) * took["evaluation"]
        of_both = took["conventional"] + took["reweighted"]
        self._per_turn = 1 if run.tiny else max(1, int(left / of_both / TURNS))
        self.num_turns = 2 if run.tiny else TURNS
        self._arms, self._schedules = {}, {}
        for name in ARMS:
            arm = self._arms[name] = Arm(name, device, train, size)
            self._schedules[name] = torch.optim.lr_scheduler.CosineAnnealingLR(
                arm.optimizer, self.num_turns * self._per_turn
            )
        return {
            "case": f"msdnet, {self._name}, {self.num_turns * self._per_turn} steps planned",
            "outcome": "measured",
            "plain ms": took["conventional"] * 1e3,
            "ours": took["reweighted"] / took["conventional"],
        }

    def turn(self, name: str, number: int) -> Row:
        """Train one arm on, and test it; at the end within budgets as well."""
        arm, per_turn = self._arms[name], self._per_turn
        train = partial(arm.train, per_turn, self._schedules[name])
        took = seconds(train, self._run.device)
        tested = evaluate(arm.model, self._splits["test"])
        num_samples = number * per_turn * BATCH / 2
        row: Row = {
            "case": f"msdnet, {self._name}, {name}",
            "outcome": "measured",
            "steps": number * per_turn,
            "epochs": num_samples / len(self._splits["train"].target),
            "ms a step": took / per_turn * 1e3,
            "exits": [round(float(a), 4) for a in anytime_accuracy(tested)],
        }
        if number == self.num_turns:
            image = self._splits["train"].inputs[0][:1]
            costs = exit_costs(arm.model, image, in_order=True)
            calibration = evaluate(arm.model, self._splits["calibration"])
            curve = budgeted_curve(calibration, tested, costs)
            row["budgeted"] = sum(point.accuracy for point in curve) / len(curve)
        return row


def seconds(action: Callable[[], object], device: str) -> float:
    wait_for(device)
    start = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - start


def rows(run: Run) -> Iterator[Callable[[], Row]]:
    """How fast both arms are, then a row of each in turns; an error where the files are missing."""
    training = Training(run)
    yield training.prepare
    for number in range(1, training.num_turns + 1):
        for name in ARMS:
            yield partial(training.turn, name, number)
