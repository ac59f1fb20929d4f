"""The families of timm: of each of its modules the smallest model, by its name."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from databases.judge import Case
from databases.oracles import NUM_SAMPLES, Training

NUM_CLASSES = 3
SIZES = (64, 96, 128, 224, 256)
SMALL = (
    "test atto zepto femto pico nano xxs xxtiny xtiny tiny ti16 micro mini lite 050 035 025 s0 m0 "
    "m1 b0 t0 t8 a xs t s small 11 13 14 14d 18 19 19b 26 26t 32 34 42 48b 004 121 128s 50"
)
"""How the names of small models end, or go on with an underscore, the smallest first."""


def entries() -> Mapping[str, str]:
    """The name of a model, by its module; the small ones come first."""
    import timm

    found = {module: timm.list_models(module=module) for module in timm.list_modules()}
    smallest = {module: min(names, key=_rank) for module, names in found.items() if names}
    return dict(sorted(smallest.items(), key=lambda item: _rank(item[1])))


def _rank(name: str) -> tuple[int, int, str]:
    parts = (i for i, part in enumerate(SMALL.split()) if re.search(f"{part}(?=_|$)", name))
    return next(parts, len(SMALL.split())), len(name), name


def cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """In training mode, at the smallest images that it takes."""
    options, size = _size(name)
    yield Case(f"{name}, {size} x {size}", partial(_training, name, options, size))


def _size(name: str) -> tuple[dict[str, int], int]:
    """How it is made for the smallest images, and their size."""
    for size in SIZES:
        for options in ({"img_size": size, "depth": 2}, {"img_size": size}, {}):
            try:
                model = _model(name, options).train()
                with torch.no_grad():
                    model(torch.zeros(2, 3, size, size))
                return options, size
            except Exception:  # it takes no such option, or no such images
                continue
    raise ValueError(f"It takes no images of {SIZES}.")


def _model(name: str, options: dict[str, int]) -> Any:
    import timm

    return timm.create_model(name, num_classes=NUM_CLASSES, **options)


def _training(name: str, options: dict[str, int], size: int, dtype: torch.dtype) -> Training:
    model = _model(name, options).to(dtype).train()
    batches = []
    for _ in range(2):
        images = torch.randn(NUM_SAMPLES, 3, size, size, dtype=torch.float64).to(dtype)
        batches.append((images, torch.randint(NUM_CLASSES, (NUM_SAMPLES,))))
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.01), *batches)
