"""Early exit that does stop computing: each stage runs on the samples no exit has answered yet.

As a script: what ``train.py`` saved answers its test set at the thresholds of a budget, beside the
whole net.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from reweight import exit_cross_entropy
from staged import StagedNet

__all__ = ["Answers", "answer"]


class Answers(NamedTuple):
    """What a net answered, and where.

    Attributes:
        classes: the predicted class of each sample, shape [B], int64.
        confidence: the softmax probability of that class, shape [B], float64.
        exits: the exit that answered, counted from 0, shape [B], int64.
    """

    classes: Tensor
    confidence: Tensor
    exits: Tensor


@torch.no_grad()
def answer(net: StagedNet, inputs: Tensor, thresholds: Tensor) -> Answers:
    """Each sample leaves at the first exit whose confidence reaches its threshold.

    Exits and classes are those that ``choose_exits`` takes from the logits of the whole net in
    float64. Rows are computed in smaller batches here, which may round differently: a sample whose
    confidence lies as near to a threshold as the rounding of the net's precision (about 1e-6 in
    float32, 1e-15 in float64) can leave at another exit.

    Args:
        net: in evaluation mode; BatchNorm in training mode would see other batches.
        inputs: shape [B, ...].
        thresholds: the confidence each exit asks for, shape [K], as of ``find_thresholds``; that of
            the last is not looked at.

    Raises:
        ValueError: there is no sample, the net is in training mode, or the number of thresholds is
            not K.
    """
    num_exits = len(net.exits)
    if len(inputs) == 0:
        raise ValueError(f"inputs must hold a sample, got shape {list(inputs.shape)}")
    if net.training:
        raise ValueError("net must be in evaluation mode: call net.eval() first")
    if thresholds.shape != (num_exits,):
        raise ValueError(f"thresholds must have shape [{num_exits}], got {list(thresholds.shape)}")
    classes = torch.empty(len(inputs), dtype=torch.int64, device=inputs.device)
    confidence = torch.empty(len(inputs), dtype=torch.float64, device=inputs.device)
    exits = torch.empty_like(classes)
    left = torch.arange(len(inputs), device=inputs.device)
    asked = thresholds.double()
    state: Any = inputs
    for k in range(num_exits):
        logits, state = net.stage(k, state)
        predicted = logits.argmax(1)
        (confidence_here,) = _confidence(logits, predicted).unbind(1)
        leaves = confidence_here >= asked[k]
        if k == num_exits - 1:
            leaves[:] = True
        num_leaving = int(leaves.sum())
        if num_leaving == 0:
            continue
        gone = left[leaves]
        classes[gone], confidence[gone], exits[gone] = predicted[leaves], confidence_here[leaves], k
        if num_leaving == len(left):
            break
        stays = ~leaves
        left = left[stays]
        state = _rows(state, stays)
    return Answers(classes, confidence, exits)


def _rows(state: Any, chosen: Tensor) -> Any:
    return tree_map(lambda tensor: tensor[chosen], state)


def _confidence(logits: Tensor, predicted: Tensor) -> Tensor:
    """By the code that the thresholds were found with."""
    confidence = exit_cross_entropy([logits.double()], predicted).confidence
    assert confidence is not None
    return confidence


def main(arguments: list[str] | None = None) -> None:
    """Answer the test set of a saved net, by early exit and by the whole net."""
    from data import load_data
    from train import MODELS, batches_of, costs_of  # here, for who needs `answer` alone

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("net", type=Path, help="what train.py saved: runs/digits/reweighted.pt")
    add("--power", type=float, default=0.75, help="p of the shares p^k: smaller answers earlier")
    add("--batch-size", type=int, default=256)
    chosen = parser.parse_args(arguments)
    saved = torch.load(chosen.net, weights_only=True)
    powers = saved["thresholds"]
    power = min(powers, key=lambda each: abs(each - chosen.power))
    settings = saved["settings"]
    names = ("seed", "label_noise", "long_tail", "train_size", "meta_size")
    folder = settings["data_dir"] and Path(settings["data_dir"])
    try:
        data = load_data(settings["data"], folder, **{name: settings[name] for name in names})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    net = MODELS[settings["model"]](data)
    net.load_state_dict(saved["model"])
    net.eval()

    batches = list(batches_of(data.test, chosen.batch_size))
    target = torch.cat([labels for _, labels in batches])
    start = time.perf_counter()
    parts = [answer(net, images, powers[power]) for images, _ in batches]
    middle = time.perf_counter()
    with torch.no_grad():
        whole = torch.cat([net(images)[-1].argmax(1) for images, _ in batches])
    end = time.perf_counter()
    answers = Answers(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    costs = torch.tensor(costs_of(net, data), dtype=torch.float64)
    shares = answers.exits.bincount(minlength=len(costs)).double() / len(target)
    print(f"shares of the exits at p = {power}: {', '.join(f'{s:.1%}' for s in shares)}")
    for name, classes, cost, seconds in (
        ("early exit", answers.classes, costs[answers.exits].mean(), middle - start),
        ("whole net", whole, costs[-1], end - middle),
    ):
        accuracy = (classes == target).double().mean()
        print(f"{name}: {accuracy:.2%} at {cost:,.0f} multiply-adds an answer, {seconds:.2f} s")


if __name__ == "__main__":
    main()
