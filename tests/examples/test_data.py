"""Reading, splitting and hardening of the example data, on small files written here."""

import gzip
import hashlib
import io
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import data
from data import ImageFolder, augment, load_data

NAMES = ["fashion-mnist", "cifar10", "cifar100"]


def random_bytes(count: int) -> bytes:
    return torch.randint(0, 256, (count,), dtype=torch.uint8).numpy().tobytes()


def idx(sizes: list[int], content: bytes, dtype: int = 8) -> bytes:
    header = bytes([0, 0, dtype, len(sizes)])
    return header + b"".join(size.to_bytes(4, "big") for size in sizes) + content


def fashion_mnist_files() -> dict[str, bytes]:
    files = {}
    for part, count in (("train", 100), ("t10k", 20)):
        labels = bytes(number % 10 for number in range(count))
        files[f"{part}-images-idx3-ubyte"] = idx([count, 28, 28], random_bytes(count * 28 * 28))
        files[f"{part}-labels-idx1-ubyte"] = idx([count], labels)
    return files


def cifar_records(numbers: range, num_classes: int) -> bytes:
    coarse = b"\x07" if num_classes == 100 else b""
    return b"".join(
        coarse + bytes([number % num_classes]) + random_bytes(3 * 32 * 32) for number in numbers
    )


def published_files(name: str) -> dict[str, bytes]:
    if name == "fashion-mnist":
        return fashion_mnist_files()
    if name == "cifar100":
        return {
            "cifar-100-binary/train.bin": cifar_records(range(200), 100),
            "cifar-100-binary/test.bin": cifar_records(range(100), 100),
        }
    return {
        **{
            f"cifar-10-batches-bin/data_batch_{k}.bin": cifar_records(range(8 * k, 8 * k + 8), 10)
            for k in range(1, 6)
        },
        "cifar-10-batches-bin/test_batch.bin": cifar_records(range(20), 10),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def packed(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files as they come from their host."""
    if name == "fashion-mnist":
        return {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    archive = "cifar-10-binary.tar.gz" if name == "cifar10" else "cifar-100-binary.tar.gz"
    return {archive: tar_gz({"README": b"hello", **files})}


def laid_out(name: str, files: dict[str, bytes], layout: str) -> dict[str, bytes]:
    if layout == "packed":
        return packed(name, files)
    return files if layout == "unpacked" else {Path(f).name: files[f] for f in files}


def pixels_of_the_test_set(name: str, files: dict[str, bytes]) -> Tensor:
    """The pixels of the test set, cut out of the files the plain way."""
    if name == "fashion-mnist":
        content = files["t10k-images-idx3-ubyte"][16:]
        return torch.tensor(list(content)).view(-1, 1, 28, 28)
    record = 3073 if name == "cifar10" else 3074
    rows = torch.tensor(list(next(reversed(files.values())))).view(-1, record)
    return rows[:, -3072:].reshape(-1, 3, 32, 32)


def standardised(images: Tensor) -> Tensor:
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), keepdim=True)
    return (images - mean) / std


@pytest.mark.parametrize("layout", ["packed", "unpacked", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_published_files_are_read(name: str, layout: str, tmp_path: Path) -> None:
    files = published_files(name)
    read = load_data(name, write(tmp_path, laid_out(name, files, layout)))
    original = pixels_of_the_test_set(name, files)
    num_classes = 100 if name == "cifar100" else 10

    images, labels = read.test.tensors
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == [number % num_classes for number in range(len(original))]
    torch.testing.assert_close(standardised(images), standardised(original), rtol=0, atol=1e-5)
    assert (read.num_classes, read.input_shape) == (num_classes, tuple(original.shape[1:]))
    assert read.augment == name.startswith("cifar")


@pytest.mark.parametrize("name", NAMES)
def test_calibration_is_held_out_of_the_training_set(name: str, tmp_path: Path) -> None:
    read = load_data(name, write(tmp_path, published_files(name)))
    images, labels = read.train.tensors
    held_out, held_out_labels = read.calibration.tensors
    num_samples = len(images) + len(held_out)
    assert len(held_out) == round(num_samples / 10)
    num_classes = read.num_classes
    counts = torch.cat([labels, held_out_labels]).bincount(minlength=num_classes)
    assert (counts == num_samples // num_classes).all()
    assert not {image.sum().item() for image in images} & {image.sum().item() for image in held_out}
    std, mean = torch.std_mean(images, dim=(0, 2, 3))
    torch.testing.assert_close(std, torch.ones_like(std))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)


def test_digits_is_split_by_class() -> None:
    digits = load_data("digits")
    assert digits.input_shape == (1, 8, 8)
    parts = (digits.train, digits.calibration, digits.test)
    assert [len(part) for part in parts] == [1078, 269, 450]
    counts = torch.stack([part.tensors[1].bincount() for part in parts])  # [3,C]
    shares = torch.tensor([[0.6], [0.15], [0.25]])
    assert (counts - shares * counts.sum(0)).abs().max() < 1.5
    assert torch.equal(digits.train.tensors[1], digits.train_clean_labels)


def test_seed_decides_alone() -> None:
    settings: dict[str, Any] = {"label_noise": 0.3, "long_tail": 5.0, "train_size": 500}
    state = torch.get_rng_state()
    first = load_data("digits", seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, other = (load_data("digits", seed=seed, **settings) for seed in (3, 4))
    for part in ("train", "calibration", "test"):
        one, two = getattr(first, part).tensors, getattr(again, part).tensors
        assert all(map(torch.equal, one, two))
    assert not torch.equal(first.test.tensors[1], other.test.tensors[1])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_label_noise_replaces_its_share_of_training_labels(share: float) -> None:
    clean, noisy = load_data("digits"), load_data("digits", label_noise=share)
    labels = noisy.train.tensors[1]
    wrong = labels != noisy.train_clean_labels
    assert wrong.sum() == round(share * len(labels))
    assert torch.equal(noisy.train_clean_labels, clean.train.tensors[1])
    assert torch.equal(noisy.train.tensors[0], clean.train.tensors[0])
    assert torch.equal(noisy.calibration.tensors[1], clean.calibration.tensors[1])
    assert torch.equal(noisy.test.tensors[1], clean.test.tensors[1])
    if share == 1:  # 1078 draws among nine offsets
        offsets = (labels - noisy.train_clean_labels).remainder(10).bincount(minlength=10)
        assert offsets[0] == 0
        assert offsets[1:].min() > 80


@pytest.mark.parametrize("factor", [1.0, 10.0, 1e6])
def test_long_tail_shrinks_class_by_class(factor: float) -> None:
    counts = load_data("digits").train.tensors[1].bincount().tolist()
    tailed = load_data("digits", long_tail=factor).train.tensors[1].bincount().tolist()
    wanted = [max(1, round(max(counts) * factor ** (-c / 9))) for c in range(10)]
    assert tailed == [min(pair) for pair in zip(counts, wanted, strict=True)]


@pytest.mark.parametrize("size", [1, 10, 205, 1078])
def test_train_size_keeps_the_classes_in_proportion(size: int) -> None:
    whole, small = load_data("digits"), load_data("digits", train_size=size)
    assert len(small.train) == size
    deviation = small.train.tensors[1].bincount(minlength=10) - size * (
        whole.train.tensors[1].bincount() / len(whole.train)
    )
    assert deviation.abs().max() < 1.5
    assert len(small.calibration) == len(whole.calibration)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "mnist"}, "name must be one of digits, fashion-mnist, .*, got 'mnist'"),
        ({"label_noise": -0.1}, "label_noise must be a share from 0 to 1, got -0.1"),
        ({"label_noise": 40}, "label_noise must be a share from 0 to 1, got 40"),
        ({"label_noise": math.nan}, "label_noise must be a share from 0 to 1, got nan"),
        ({"long_tail": 0.01}, "long_tail must be finite and at least 1 .*, got 0.01"),
        ({"long_tail": math.inf}, "long_tail must be finite and at least 1 .*, got inf"),
        ({"train_size": 0}, "train_size must be from 1 to 1078, .*, got 0"),
        ({"train_size": 1079}, "train_size must be from 1 to 1078, .*, got 1079"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(**{"name": "digits", **wrong})


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BATCH = "cifar-10-batches-bin/data_batch_3.bin"
DAMAGE: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
    ("fashion-mnist", IMAGES, lambda b: b[:-1], r"sizes \[100, 28, 28\] and 78399 bytes"),
    ("fashion-mnist", IMAGES, lambda b: b[:10], r"as many as its header says"),
    ("fashion-mnist", IMAGES, lambda b: b"", "must begin with 0x00000803, got 0x$"),
    ("fashion-mnist", IMAGES, lambda b: idx([100, 28, 28], b[16:], 13), "got 0x00000d03"),
    ("fashion-mnist", IMAGES, lambda b: idx([100, 784], b[16:]), "got 0x00000802"),
    ("fashion-mnist", IMAGES, lambda b: idx([25, 56, 56], b[16:]), r"items of shape \(28, 28\)"),
    ("fashion-mnist", LABELS, lambda b: idx([0], b""), "as many as its header says"),
    ("fashion-mnist", LABELS, lambda b: idx([90], b[8:98]), "label for each of the 100 images"),
    ("fashion-mnist", LABELS, lambda b: b[:-1] + b"\x0a", "labels below 10, got 10"),
    ("fashion-mnist", f"{IMAGES}.gz", lambda b: gzip.compress(b)[:-99], "is damaged"),
    ("fashion-mnist", f"{IMAGES}.gz", lambda b: b, "is damaged or not what its name says"),
    ("cifar10", BATCH, lambda b: b[:-1], "records of 3073 bytes, got 24583 bytes"),
    ("cifar10", BATCH, lambda b: b"", "records of 3073 bytes, got 0 bytes"),
    ("cifar10", BATCH, lambda b: b"\x0a" + b[1:], "labels below 10, got 10"),
    ("cifar100", "cifar-100-binary/test.bin", lambda b: b[:3073], "records of 3074 bytes"),
    ("cifar100", "cifar-100-binary/test.bin", lambda b: b"\0\x64" + b[2:], "below 100, got 100"),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGE)
def test_damaged_files_are_named(
    name: str, file: str, damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    files = published_files(name)
    files[file] = damage(files.pop(file.removesuffix(".gz")))
    with pytest.raises(ValueError, match=message) as raised:
        load_data(name, write(tmp_path, files))
    assert str(tmp_path / file) in str(raised.value)


@pytest.mark.parametrize("damage", ["truncated", "not an archive", "lacks a file"])
def test_damaged_archives_are_named(damage: str, tmp_path: Path) -> None:
    files = published_files("cifar100")
    whole = tar_gz(files)
    files.popitem()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "not an archive": b"not an archive",
        "lacks a file": tar_gz(files),
    }
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"cifar-100-binary\.tar\.gz is damaged"):
        load_data("cifar100", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_listed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "_SYSTEM_FOLDER", tmp_path / "system")
    files = published_files(name)
    files.popitem()
    write(tmp_path / "data" / name, files)  # all but one do not help
    with pytest.raises(FileNotFoundError) as raised:
        load_data(name)
    message = str(raised.value)
    wanted = [*published_files(name), f"data/{name}", str(tmp_path / "system" / name), "--download"]
    wanted += ["dataset-fashion-mnist"] if name == "fashion-mnist" else []
    assert [part for part in (*wanted, "https://") if part not in message] == []

    write(tmp_path / "system" / name, packed(name, published_files(name)))
    assert len(load_data(name).test) > 0


def serve(name: str, files: dict[str, bytes], host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `host` be where the files, packed, are fetched from."""
    served = packed(name, files)
    write(host, served)
    sums = {(host / file).as_uri(): hashlib.md5(served[file]).hexdigest() for file in served}
    monkeypatch.setitem(data._DOWNLOADS, name, sums)


@pytest.mark.parametrize("name", NAMES)
def test_download_fetches_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = published_files(name)
    serve(name, files, tmp_path / "host", monkeypatch)
    fetched = load_data(name, tmp_path / "new" / "here", download=True)
    read = load_data(name, write(tmp_path / "there", files))
    assert torch.equal(fetched.train.tensors[0], read.train.tensors[0])
    assert {path.name for path in (tmp_path / "new" / "here").iterdir()} == set(packed(name, files))

    shutil.rmtree(tmp_path / "host")
    load_data(name, tmp_path / "new" / "here", download=True)  # needs the host no more


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_failed_download_leaves_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("cifar100", published_files("cifar100"), tmp_path / "host", monkeypatch)
    file = tmp_path / "host" / "cifar-100-binary.tar.gz"
    if damage == "altered":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    error, message = (
        (ValueError, "md5") if damage == "altered" else (OSError, "could not be fetched")
    )
    with pytest.raises(error, match=rf"cifar-100-binary\.tar\.gz .*{message}"):
        load_data("cifar100", tmp_path / "here", download=True)
    assert list((tmp_path / "here").iterdir()) == []


def test_published_addresses_are_safe() -> None:
    assert all(url.startswith("https://") for urls in data._DOWNLOADS.values() for url in urls)


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Ten red images of the class "a" and ten blue ones of "b", a green border left and right."""
    image_module = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            image = image_module.new("RGB", (64, 32), (0, 255, 0))
            image.paste(colour, (16, 0, 48, 32))
            for number in range(10):
                image.save(folder / f"{number}.png")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_image_folder_is_read(image_root: Path) -> None:
    read = load_data("imagefolder", image_root)
    assert (read.num_classes, read.input_shape, read.augment) == (2, (3, 224, 224), False)
    assert [len(part) for part in (read.train, read.calibration, read.test)] == [18, 2, 20]
    assert read.train_clean_labels.bincount().tolist() == [9, 9]
    image, label = read.test[0]
    assert (image.shape, image.dtype, label) == ((3, 224, 224), torch.float32, 0)
    # The square in the middle, and nothing of the border: red at full, green and blue at none.
    pure_red = (torch.tensor([1.0, 0, 0]) - data._IMAGENET_MEAN.flatten()) / (
        data._IMAGENET_STD.flatten()
    )
    torch.testing.assert_close(image, pure_red.view(3, 1, 1).expand_as(image))


def test_image_folder_crops_at_random_for_training(image_root: Path) -> None:
    train = load_data("imagefolder", image_root).train
    torch.manual_seed(0)
    crops = [train[0][0] for _ in range(8)]
    assert all(crop.shape == (3, 224, 224) for crop in crops)
    assert not all(torch.equal(crops[0], crop) for crop in crops)
    torch.manual_seed(0)
    assert torch.equal(train[0][0], crops[0])


def test_image_folder_is_hardened_by_index(image_root: Path) -> None:
    settings: dict[str, Any] = {"train_size": 16, "long_tail": 4.0, "label_noise": 0.5}
    train = load_data("imagefolder", image_root, **settings).train
    clean = load_data("imagefolder", image_root, **settings).train_clean_labels
    assert isinstance(train, ImageFolder)
    assert [Path(path).parent.name for path in train.paths] == ["ab"[label] for label in clean]
    assert clean.bincount().tolist() == [8, 2]
    assert (train.labels != clean).sum() == 5


@pytest.mark.parametrize("missing", ["train", "val", "val/b"])
def test_missing_images_are_named(missing: str, image_root: Path) -> None:
    shutil.rmtree(image_root / missing)
    part = "test" if missing == "val" else missing.split("/")[0]
    with pytest.raises(FileNotFoundError, match=f"/{part} must have images"):
        load_data("imagefolder", image_root)


@pytest.mark.parametrize("shape", [(60, 3, 32, 32), (60, 1, 5, 9), (0, 3, 8, 8)])
def test_augment_shifts_and_mirrors_each_image(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.is_contiguous()
    height, width = shape[2:]
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for whole, result in zip(padded, changed, strict=True):
        crops = {
            (top, left, mirror): crop.flip(2) if mirror else crop
            for top in range(9)
            for left in range(9)
            for mirror in (False, True)
            for crop in [whole[:, top : top + height, left : left + width]]
        }
        (found,) = [key for key, crop in crops.items() if torch.equal(crop, result)]
        seen.add(found)
    if len(images):
        assert [len(set(choices)) for choices in zip(*seen, strict=True)] == [9, 9, 2]


def test_augment_draws_from_its_generator_alone() -> None:
    images = torch.randn(6, 3, 32, 32)
    state = torch.get_rng_state()
    first, again, other = (
        augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_whole_batches_are_taken_by_index() -> None:
    train = load_data("digits", train_size=100).train
    sampler = BatchSampler(RandomSampler(train), batch_size=40, drop_last=False)
    batches = list(DataLoader(train, sampler=sampler, batch_size=None))
    assert [images.shape for images, _ in batches] == [(n, 1, 8, 8) for n in (40, 40, 20)]
    labels: Tensor = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels.sort().values, train.tensors[1].sort().values)


def test_neighbours_are_the_next_class() -> None:
    clean, noisy = load_data("digits"), load_data("digits", label_noise=0.4, neighbours=True)
    before, after = clean.train.tensors[1], noisy.train.tensors[1]
    offset = (after - before) % 10
    assert set(offset.tolist()) == {0, 1}
    assert int(offset.sum()) == round(0.4 * len(before))
