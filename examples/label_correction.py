"""Label correction: each loss twice, of the given label and of what an averaged model says instead.

    pip install -e ".[examples]"
    python examples/label_correction.py               # one exit
    python examples/label_correction.py --exits 4     # as well with several

Digits of which 40 % are labelled wrongly, and 100 clean ones that judge. A sample's loss at an exit
is a row with two columns, to the given label and to the pseudo-label, and its two weights average
1: where the network distrusts the label it trusts the averaged model (CMW-Net-SL, Shu et al.,
2023). Beside it weights alone, the sigmoid's, which can only leave a sample out.
"""

import argparse
from statistics import mean

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from noisy_labels import BATCH, NUM_CLEAN, NUM_TEST, load
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from small import MultiExitMLP


def both_losses(outputs: list[Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """K logits [B, C], given labels [B] and pseudo-labels [B] → losses [B·K, 2]."""
    columns = [
        torch.stack([cross_entropy(z, labels, reduction="none") for z in outputs], dim=1)
        for labels in target
    ]
    return torch.stack(columns, dim=2).flatten(0, 1)


def train(seed: int, epochs: int, num_exits: int, corrected: bool) -> tuple[float, Tensor, Tensor]:
    """Mean accuracy of the exits on the test set; weights of right and of wrong labels."""
    images, labels, given = load(seed)
    model = MultiExitMLP((64,), num_classes=10, num_exits=num_exits, width=256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    objective = MeanObjective()
    if corrected:
        reweighter = SampleReweighter(2, form="sigmoid", average_over="exits")
        step = MetaReweightStep(model, optimizer, reweighter, objective=objective, loss=both_losses)
    else:
        reweighter = SampleReweighter(num_exits, form="sigmoid")
        step = MetaReweightStep(model, optimizer, reweighter, objective=objective)
    clean = labels[:NUM_CLEAN]
    seen: list[tuple[Tensor, Tensor]] = []
    for _ in range(epochs):
        order = torch.randperm(len(labels) - NUM_TEST)
        seen.clear()
        for rows in order[order >= NUM_CLEAN].split(BATCH):
            optimizer.zero_grad()
            if corrected:
                with torch.no_grad():
                    pseudo = averaged(images[rows])[-1].argmax(1)
                train_both = images[rows], (given[rows], pseudo)
                meta_batch = images[:NUM_CLEAN], (clean, clean)
                # Means over B·K rows of two columns, where plain training adds up K means over B.
                result = step.backward(train_both, meta_batch, scale=num_exits / 2)
                weights = result.weights[:, 0].view(-1, num_exits)
            else:
                train_batch = images[rows], given[rows]
                weights = step.backward(train_batch, (images[:NUM_CLEAN], clean)).weights
            optimizer.step()
            averaged.update_parameters(model)
            seen.append((weights.mean(1), given[rows] == labels[rows]))
        scheduler.step()
    with torch.no_grad():
        predictions = torch.stack([z.argmax(1) for z in model(images[-NUM_TEST:])])
    right = predictions == labels[-NUM_TEST:]
    weights, is_right = map(torch.cat, zip(*seen, strict=True))
    return 100 * right.double().mean().item(), weights[is_right], weights[~is_right]


def main(arguments: list[str] | None = None) -> None:
    """Train both on every seed and say how they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--exits", type=int, default=1)
    settings = parser.parse_args(arguments)
    gains = []
    for seed in track(range(settings.seeds), description="seeds"):
        alone, *_ = train(seed, settings.epochs, settings.exits, corrected=False)
        ours, right, wrong = train(seed, settings.epochs, settings.exits, corrected=True)
        gains.append(ours - alone)
        print(
            f"seed {seed}: weights alone {alone:.1f} %, label correction {ours:.1f} %; trust in a "
            f"right label {right.mean() / 2:.2f}, in a wrong one {wrong.mean() / 2:.2f}"
        )
    print(f"gain {mean(gains):+.1f} points, from {min(gains):+.1f} to {max(gains):+.1f}")


if __name__ == "__main__":
    main()
