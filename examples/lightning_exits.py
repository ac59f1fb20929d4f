"""A multi-exit net in Lightning on scikit-learn's digits, trained without the callback and with it.

python examples/lightning_exits.py
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import load_data
from reweight import (
    ExitLosses,
    SampleReweighter,
    budgeted_curve,
    exit_costs,
    exit_cross_entropy,
    swap_halves,
)
from reweight.batches import Batch
from reweight.integrations.lightning import MetaReweight
from small import MultiExitMLP


class Digits(LightningModule):
    """Four exits, as one would train them without reweighting."""

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self.net, self.max_steps = MultiExitMLP((1, 8, 8), 10), max_steps

    def forward(self, images: Tensor) -> list[Tensor]:
        """The logits of the exits: what the callback trains by."""
        logits: list[Tensor] = self.net(images)
        return logits

    def training_step(self, batch: tuple[Batch, Batch], batch_idx: int) -> Tensor:
        """The plain sum over the exits, on the same batches; the callback does this itself."""
        (images, target), _ = batch
        return exit_cross_entropy(self(images), target).losses.mean(0).sum()

    def configure_optimizers(self) -> Any:
        """SGD with a cosine schedule, step by step."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@torch.no_grad()
def answers(module: Digits, part: Dataset[Any]) -> ExitLosses:
    """Losses, confidence and correctness of a part of the data, in one batch."""
    images, target = next(iter(DataLoader(part, batch_size=10_000)))
    return exit_cross_entropy(module(images), target)


def main(arguments: list[str] | None = None) -> None:
    """Train both and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load_data("digits", seed=options.seed)

    for name in ("conventional", "reweighted"):
        seed_everything(options.seed, verbose=False)  # the same net and batches for both
        loader = DataLoader(data.train, batch_size=128, shuffle=True, drop_last=True)
        module = Digits(max_steps=2 * len(loader) * options.epochs)
        callback = MetaReweight(SampleReweighter(num_exits=4))
        trainer = Trainer(
            max_epochs=options.epochs,
            callbacks=[callback] if name == "reweighted" else [],
            accelerator="auto",
            devices=1,
            logger=False,  # or one of Lightning's: the callback's scalars go to it
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, swap_halves(loader))

        module = module.cpu().eval()
        held_out, test = (answers(module, part) for part in (data.calibration, data.test))
        costs = exit_costs(module.net, torch.zeros(1, *data.input_shape))
        assert test.correct is not None
        exits = "  ".join(f"{share:.1%}" for share in test.correct.double().mean(0).tolist())
        print(f"{name}: accuracy of the exits {exits}")
        for point in budgeted_curve(held_out, test, costs, powers=[0.5, 1.0, 1.5]):
            print(f"  within a budget {point.accuracy:.1%} at {point.cost:,.0f} multiply-adds")
        for metric, value in trainer.callback_metrics.items():
            if "/weight/" in metric:
                print(f"  {metric} {value:.3f}")


if __name__ == "__main__":
    main()
