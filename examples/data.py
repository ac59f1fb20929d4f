"""Image data sets read from their published files: nothing unpickled, nothing fetched unasked."""

import gzip
import hashlib
import math
import os
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = ["Data", "ImageFolder", "augment", "load_data"]

# Training images [N,C,H,W] uint8 or an array of their paths [N], and labels [N]; the same of the
# test set; the number of classes.
_Raw = tuple[Any, Tensor, Any, Tensor, int]
_File = tuple[Path, bytes]

_FASHION_MNIST = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_DOWNLOADS = {  # address and md5
    "fashion-mnist": {
        f"{_FASHION_MNIST}/train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        f"{_FASHION_MNIST}/train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        f"{_FASHION_MNIST}/t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        f"{_FASHION_MNIST}/t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "cifar10": {f"{_CIFAR}/cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    "cifar100": {f"{_CIFAR}/cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
}
_FILES = {  # those of the test set last
    "fashion-mnist": [Path(url).stem for url in _DOWNLOADS["fashion-mnist"]],
    "cifar10": [
        *(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
        "cifar-10-batches-bin/test_batch.bin",
    ],
    "cifar100": ["cifar-100-binary/train.bin", "cifar-100-binary/test.bin"],
}
_SYSTEM_FOLDER = Path("/usr/share/datasets")
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
_IMAGE_SIZE = 224
_IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images read when asked for: (float32 [3,224,224] with ImageNet's normalisation, label).

    With `random_crop` an image is cropped (8 to 100 % of it, aspect 3/4 to 4/3) and mirrored at
    random, by torch's global generator, which a DataLoader seeds anew for each worker and epoch.
    Without it comes the centre of the image, 7/8 of its shorter side.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, random_crop: bool = False) -> None:
        self.paths = paths
        self.labels = labels
        self.random_crop = random_crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        width, height = image.size
        crop_width = crop_height = min(width, height) * 7 / 8
        across, down, mirror = 0.5, 0.5, False
        if self.random_crop:
            size, shape, across, down, coin = torch.rand(5).tolist()
            area, aspect = (0.08 + 0.92 * size) * width * height, (3 / 4) ** (1 - 2 * shape)
            crop_width = min(width, math.sqrt(area * aspect))
            crop_height = min(height, math.sqrt(area / aspect))
            mirror = coin < 0.5
        left, top = across * (width - crop_width), down * (height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        scaled = (pixels / 255 - _IMAGENET_MEAN) / _IMAGENET_STD
        return (scaled.flip(2) if mirror else scaled).contiguous(), int(self.labels[index])


_Part = TensorDataset | ImageFolder


@dataclass(frozen=True)
class Data:
    """A data set in three parts.

    Attributes:
        train: Training samples, with whatever noise and imbalance was asked for.
        meta: Clean samples set aside from the training data, all classes alike, to judge by; None
            if none were asked for.
        calibration: Clean samples held out of the training data, for the exits' thresholds.
        test: Test samples.
        train_clean_labels: Labels [N] of `train` before label noise.
        num_classes: Classes C.
        input_shape: Shape (channels, height, width) of one image.
        augment: Whether batches of `train` want `augment`.
    """

    train: _Part
    meta: _Part | None
    calibration: _Part
    test: _Part
    train_clean_labels: Tensor
    num_classes: int
    input_shape: tuple[int, ...]
    augment: bool


def load_data(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    label_noise: float = 0.0,
    neighbours: bool = False,
    long_tail: float = 1.0,
    train_size: int | None = None,
    meta_size: int = 0,
    download: bool = False,
) -> Data:
    """Read a data set, split it and make its training set as hard as asked.

    All but "imagefolder" become `TensorDataset`s of images [N,C,H,W], float32, normalised by the
    mean and standard deviation of the training images, and labels [N], int64. The calibration set
    is 10 % of the published training set. Digits, published in one piece, is split 60/15/25.

    Args:
        name: "digits", "fashion-mnist", "cifar10", "cifar100", or "imagefolder" for
            `data_dir`/train/CLASS/* and `data_dir`/val/CLASS/* (or test).
        data_dir: Where the files are; by default data/NAME, then /usr/share/datasets/NAME.
        seed: Of every random choice made here. The global random state plays no part.
        label_noise: Share of the training labels replaced by a different class, drawn uniformly.
        neighbours: Take the next class in place of one drawn, the first after the last.
        long_tail: How many times more samples the first class keeps than the last: class c of C
            keeps the largest class's number times `long_tail ** (-c / (C - 1))`, if it has them.
        meta_size: How many samples to set aside, of each class alike, before the training set is
            made smaller or harder.
        train_size: How many training samples to keep, of each class in proportion, before the
            tail is cut; by default all.
        download: Fetch the files into `data_dir` if they are not there.
    """
    names = ("digits", *_FILES, "imagefolder")
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise must be a share from 0 to 1, got {label_noise}")
    if not 1 <= long_tail < math.inf:
        raise ValueError(f"long_tail must be finite and at least 1 (no tail), got {long_tail}")
    generator = torch.Generator().manual_seed(seed)
    folders = [Path("data", name), _SYSTEM_FOLDER / name] if data_dir is None else [Path(data_dir)]
    if name == "imagefolder":
        raw = _list_images(folders[0])
    elif name == "digits":
        raw = _read_digits(generator)
    else:
        raw = _read_published(name, folders, download)
    inputs, labels, test_inputs, test_labels, num_classes = raw

    order = _stratified_order(labels, generator)
    # Digits comes without its test quarter: a fifth of the rest is 15 % of the whole.
    num_held_out = max(1, round(len(order) / (5 if name == "digits" else 10)))
    held_out, train = order[:num_held_out], order[num_held_out:]
    if not 0 <= meta_size < len(train):
        raise ValueError(f"meta_size must be from 0 to {len(train) - 1}, got {meta_size}")
    meta, train = _balanced(labels, train, meta_size, num_classes)
    if train_size is not None and not 1 <= train_size <= len(train):
        raise ValueError(
            f"train_size must be from 1 to {len(train)}, all that {name} has beside what is held "
            f"out, got {train_size}"
        )
    train = train[:train_size]
    tail = long_tail ** (-torch.arange(num_classes) / max(num_classes - 1, 1))
    quota = (labels[train].bincount().max() * tail).round().clamp_min(1)
    train = train[_rank_in_class(labels[train]) < quota[labels[train]]]
    train_labels = _mislabel(labels[train], label_noise, neighbours, num_classes, generator)

    parts: tuple[_Part, _Part, _Part, _Part]
    if name == "imagefolder":
        parts = (
            ImageFolder(inputs[train], train_labels, random_crop=True),
            ImageFolder(inputs[meta], labels[meta], random_crop=True),
            ImageFolder(inputs[held_out], labels[held_out]),
            ImageFolder(test_inputs, test_labels),
        )
    else:
        images = inputs[train].float()
        std, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
        parts = (
            TensorDataset((images - mean) / std, train_labels),
            TensorDataset((inputs[meta] - mean) / std, labels[meta]),
            TensorDataset((inputs[held_out] - mean) / std, labels[held_out]),
            TensorDataset((test_inputs - mean) / std, test_labels),
        )
    shape = tuple(parts[3][0][0].shape)
    crop = name in ("cifar10", "cifar100")  # ImageFolder crops by itself
    given = parts[0], parts[1] if meta_size else None, parts[2], parts[3]
    return Data(*given, labels[train], num_classes, shape, crop)


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image [B,C,H,W] by up to 4 pixels, zeros moving in, and mirror half of them.

    On normalised images zero is the mean colour. The generator may live on another device.
    """
    batch, channels, height, width = images.shape
    device = images.device if generator is None else generator.device
    shift = torch.randint(0, 9, (2, batch, 1), generator=generator, device=device)
    mirror = torch.randint(0, 2, (batch, 1), generator=generator, device=device).bool()
    rows = shift[0] + torch.arange(height, device=device)
    columns = shift[1] + torch.arange(width, device=device)
    columns = torch.where(mirror, columns.flip(1), columns)
    pixels = rows[:, :, None] * (width + 8) + columns[:, None, :]  # [B,H,W] of the padded image
    index = pixels.to(images.device).flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return F.pad(images, (4, 4, 4, 4)).flatten(2).gather(2, index).view_as(images)


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many samples of its own class come before each sample [N]."""
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return rank


def _balanced(labels: Tensor, rows: Tensor, size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """So many of the rows, one of each class in turn, and the others, in their order."""
    turn = _rank_in_class(labels[rows]) * num_classes + labels[rows]
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[turn.argsort()[:size]] = True
    return rows[chosen], rows[~chosen]


def _stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order [N] of which every stretch holds the classes in proportion."""
    shuffled = torch.randperm(len(labels), generator=generator)
    labels = labels[shuffled]
    place = (_rank_in_class(labels) + 0.5) / labels.bincount()[labels]
    return shuffled[place.argsort(stable=True)]


def _mislabel(
    labels: Tensor, share: float, neighbours: bool, num_classes: int, generator: torch.Generator
) -> Tensor:
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    bound = 2 if neighbours else max(num_classes, 2)
    offset = torch.randint(1, bound, wrong.shape, generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + offset) % num_classes
    return noisy


def _read_digits(generator: torch.Generator) -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).byte().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test, *rest = _stratified_order(labels, generator).chunk(4)
    train = torch.cat(rest)
    return images[train], labels[train], images[test], labels[test], 10


def _list_images(root: Path) -> _Raw:
    classes = sorted(path.name for path in (root / "train").glob("*") if path.is_dir())
    lists: list[Any] = []
    for part in ("train", "val" if (root / "val").is_dir() else "test"):
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            images = sorted((root / part / name).glob("*"))
            images = [path for path in images if path.suffix.lower() in _IMAGE_SUFFIXES]
            paths += map(str, images)
            labels += [label] * len(images)
        if not classes or len(set(labels)) < len(classes):
            raise FileNotFoundError(
                f"{root / part} must have images ({', '.join(_IMAGE_SUFFIXES)}) in a folder for "
                f"each class of {root / 'train'}, has {len(set(labels))} of {len(classes)}; set "
                "data_dir to the folder that holds train and val (or test)"
            )
        lists += [np.array(paths), torch.tensor(labels)]
    return (*lists, len(classes))


def _read_published(name: str, folders: Sequence[Path], download: bool) -> _Raw:
    files = _read_files(name, folders)
    if files is None and download:
        for url, md5 in _DOWNLOADS[name].items():
            _download(url, folders[0] / Path(url).name, md5)
        files = _read_files(name, folders)
    if files is None:
        debian = " or the Debian package dataset-fashion-mnist" if name == "fashion-mnist" else ""
        raise FileNotFoundError(
            f"{name} needs {', '.join(_FILES[name])}, packed or not; looked in "
            f"{', '.join(map(str, folders))}; get {', '.join(_DOWNLOADS[name])}{debian}, or pass "
            "download=True (--download)"
        )
    num_classes = 100 if name == "cifar100" else 10
    if name == "fashion-mnist":
        parts = [_parse_fashion_mnist(*files[:2]), _parse_fashion_mnist(*files[2:])]
    else:
        parts = [_parse_cifar(file, num_classes) for file in files]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    return images, labels, *parts[-1], num_classes


def _read_files(name: str, folders: Sequence[Path]) -> list[_File] | None:
    """Path and content of every file, from the first folder that has them all."""
    for folder in folders:
        paths: list[Path] = []
        for file in _FILES[name]:
            choices = (folder / file, folder / Path(file).name, folder / f"{file}.gz")
            paths += [path for path in choices if path.is_file()][:1]
        if len(paths) == len(_FILES[name]):
            return [(path, _read(path)[0]) for path in paths]
        archive = folder / Path(next(iter(_DOWNLOADS[name]))).name
        if archive.suffixes == [".tar", ".gz"] and archive.is_file():
            contents = _read(archive, _FILES[name])
            return [(archive / file, c) for file, c in zip(_FILES[name], contents, strict=True)]
    return None


def _read(path: Path, members: Sequence[str] = ()) -> list[bytes]:
    """Content of a file, plain or gzipped, or of members of a tar archive."""
    try:
        if members:
            with tarfile.open(path, "r:gz") as archive:
                contents = {
                    entry.name: stream.read()
                    for entry in archive
                    if entry.name in members and (stream := archive.extractfile(entry))
                }
            return [contents[member] for member in members]
        content = path.read_bytes()
        return [gzip.decompress(content) if path.suffix == ".gz" else content]
    except (EOFError, KeyError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not what its name says: {error}") from error


def _parse_fashion_mnist(images_file: _File, labels_file: _File) -> tuple[Tensor, Tensor]:
    images, labels = _parse_idx(images_file, 28, 28), _parse_idx(labels_file)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_file[0]} must have a label for each of the {len(images)} images of "
            f"{images_file[0]}, got {len(labels)}"
        )
    return images.unsqueeze(1), _checked(labels, 10, labels_file[0])


def _parse_idx(file: _File, *shape: int) -> Tensor:
    """Unsigned bytes [N,*shape] after a magic number and N and the shape as big-endian integers."""
    path, content = file
    start = 8 + 4 * len(shape)
    magic = bytes([0, 0, 8, 1 + len(shape)])  # 8 is for unsigned bytes; the number of dimensions
    if content[:4] != magic:
        raise ValueError(f"{path} must begin with 0x{magic.hex()}, got 0x{content[:4].hex()}")
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if tuple(sizes[1:]) != shape or not 0 < math.prod(sizes) == len(content) - start:
        raise ValueError(
            f"{path} must hold items of shape {shape} and as many as its header says, got sizes "
            f"{sizes} and {len(content) - start} bytes"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def _parse_cifar(file: _File, num_classes: int) -> tuple[Tensor, Tensor]:
    """Records of one label, or a coarse and a fine one (CIFAR-100), and 3x32x32 bytes."""
    path, content = file
    num_labels = 2 if num_classes == 100 else 1
    record = num_labels + 3 * 32 * 32
    if not content or len(content) % record:
        raise ValueError(f"{path} must hold records of {record} bytes, got {len(content)} bytes")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    images = records[:, num_labels:].reshape(-1, 3, 32, 32)
    return images, _checked(records[:, num_labels - 1], num_classes, path)


def _checked(labels: Tensor, num_classes: int, path: Path) -> Tensor:
    if labels.max() >= num_classes:
        raise ValueError(f"{path} must have labels below {num_classes}, got {labels.max()}")
    return labels.long()


def _download(url: str, path: Path, md5: str) -> None:
    """Fetch to a folder aside, and move into place only what has the right checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        part = Path(aside, path.name)
        try:
            with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
                while chunk := response.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise OSError(f"{url} could not be fetched into {path.parent}: {error}") from error
        if digest.hexdigest() != md5:
            raise ValueError(
                f"{url} must have the md5 {md5}, got {digest.hexdigest()}; nothing was kept"
            )
        os.replace(part, path)
