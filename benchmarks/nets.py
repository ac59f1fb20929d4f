"""The nets and optimizers of the benchmarks, with batches of random numbers for them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from msdnet import MSDNet
from small import MultiExitConvNet, MultiExitMLP

Batch = tuple[Tensor, Tensor]


class ViT(nn.Module):
    """A vision transformer on patches of 4×4, with an exit after every second of 8 layers."""

    def __init__(self, width: int = 128, num_layers: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(64, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.exits = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
            for _ in range(num_layers // 2)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, 32, 32] → K logits [B, C]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2:
                logits.append(self.exits[i // 2](x.mean(1)))
        return logits


class CausalLayer(nn.Module):
    """Causal self-attention and a perceptron, each on normalised input and added to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        heads = self.queries_keys_values(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class LanguageModel(nn.Module):
    """A decoder-only transformer, with an exit after every second layer.

    The exits share one head, as they would at this vocabulary; it is not the embedding's, for
    torchopt unties what is tied.
    """

    def __init__(
        self, vocabulary: int = 8192, length: int = 64, width: int = 256, num_layers: int = 8
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(CausalLayer(width, 4) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers // 2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Tokens [B, T] → K logits [B, T, V]."""
        x = self.embedding(tokens) + self.positions
        logits = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2:
                logits.append(self.head(self.norms[i // 2](x)))
        return logits


@dataclass(frozen=True)
class Net:
    """A model to build, and what to train it on.

    Attributes:
        build: makes the model.
        num_exits: K.
        batch: makes a batch.
        num_steps: how many are timed together.
    """

    build: Callable[[], nn.Module]
    num_exits: int
    batch: Callable[[], Batch]
    num_steps: int = 1


def images(num_images: int, num_classes: int = 10, side: int = 32) -> Batch:
    return torch.randn(num_images, 3, side, side), torch.randint(num_classes, (num_images,))


def texts(num_texts: int, vocabulary: int = 8192, length: int = 64) -> Batch:
    tokens = torch.randint(vocabulary, (num_texts, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


NETS = {
    "conv": Net(lambda: MultiExitConvNet((3, 32, 32), 10, 5, 32), 5, partial(images, 128)),
    "msdnet": Net(lambda: MSDNet(10), 5, partial(images, 64)),
    "vit": Net(ViT, 4, partial(images, 64)),
    "lm": Net(LanguageModel, 4, partial(texts, 8)),
    "perceptron": Net(lambda: MultiExitMLP((3, 8, 8), 10), 4, partial(images, 32, 10, 8), 50),
}
TINY_NETS = {
    "conv": Net(lambda: MultiExitConvNet((3, 8, 8), 4, 3, 4), 3, partial(images, 12, 4, 8)),
    "msdnet": Net(lambda: MSDNet(4, num_exits=2, channels=4, growth=2), 2, partial(images, 6, 4)),
    "vit": Net(lambda: ViT(8, 4, 4), 2, partial(images, 6, 4)),
    "lm": Net(lambda: LanguageModel(12, 5, 8, 4), 2, partial(texts, 4, 12, 5)),
    "perceptron": Net(lambda: MultiExitMLP((3, 4, 4), 4, 3, 6), 3, partial(images, 12, 4, 4)),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-4),
}
