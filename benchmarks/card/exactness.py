"""Whether the step is exact on a device: held to double backward, in every precision.

Double backward in the same precision rounds the same numbers, so that both come near each other
however far both are from float64: a few roundings of what the products are rounded to, which is
what ``TOLERANCES`` allows. On a CPU the ten nets need a fifth of it. float32 is also held to
float64, as far as units of ReLU that rounding turns on or off allow it.

Fused attention draws dropout's masks in a way of its own, which has no double backward. Where a
net draws, the reference is the nearer one of double backward, with the masks of plain operations,
and of first derivatives one by one, with those of the kernels that a plain step takes: a step that
draws other masks in one of its passes is near neither.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import reweight
from card.problems import (
    CELLS,
    NETS,
    OPTIMIZERS,
    Setting,
    by_double_backward,
    hypergradient,
    one_by_one,
    placed,
)
from card.timing import Run
from reweight import MetaReweightStep, SampleReweighter

Row = dict[str, Any]
Sites = Counter[str]

PACKAGE = str(Path(reweight.__file__).parent)

# About ten times what products are rounded by, 2^-8 or 2^-11; in float32 a unit of ReLU that
# another order of sums turns is more than all rounding: 2e-5 of a net's hypergradient here.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "TF32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def held(case: str, kind: str, found: Tensor, references: dict[str, Tensor]) -> Row:
    """The row of a hypergradient that is to be near one of the references, or else is wrong."""
    errors = {name: error(found, reference) for name, reference in references.items()}
    nearest = min(errors, key=lambda name: errors[name])
    near = errors[nearest] <= TOLERANCES[kind]
    row: Row = {"case": case, "precision": kind, "outcome": "exact" if near else "wrong"}
    row["error"] = errors[nearest]
    return {**row, "of": nearest} if len(errors) > 1 else row


def references_of(
    name: str, setting: Setting, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Tensor]:
    """What a hypergradient in this setting is compared with."""
    found = {"double backward": by_double_backward(name, setting)}
    if "dropout" in name:
        found["one by one"] = one_by_one(name, setting, around())
    return found


def nets(device: str) -> Iterator[Callable[[], Row]]:
    """Forward mode of ten nets, in every precision."""
    base = Setting(device)
    settings = {
        "float64": base,
        "float32": replace(base, dtype=torch.float32),
        "TF32": replace(base, dtype=torch.float32, tf32=True),
        "bfloat16": replace(base, dtype=torch.float32, autocast=torch.bfloat16),
        "float16": replace(base, dtype=torch.float32, autocast=torch.float16),
    }

    def row(name: str, kind: str, setting: Setting) -> Row:
        found = hypergradient(name, setting)
        row = held(name, kind, found, references_of(name, setting))
        if "dropout" not in name:  # whose masks are drawn anew in each precision
            row["of float64"] = error(found, by_double_backward(name, base))
            if kind == "float32" and row["of float64"] > TOLERANCES[kind]:
                row["outcome"] = "wrong"
        return row

    for kind, setting in settings.items():
        for name in NETS:
            if kind in ("float64", "float32") or name not in CELLS:
                yield partial(row, name, kind, setting)


def optimizers(device: str) -> Iterator[Callable[[], Row]]:
    """Each as it is spelt, beside double backward through its plain spelling."""

    def row(name: str) -> Row:
        setting = Setting(device, optimizer=name)
        plain = name.partition(",")[0]
        plain = replace(setting, optimizer=plain) if plain in OPTIMIZERS else setting
        found = hypergradient("perceptron", setting)
        return held(name, "float64", found, references_of("perceptron", plain))

    for name in OPTIMIZERS:
        missing = name == "Muon" and not hasattr(torch.optim, "Muon")
        if not missing and not (device == "cpu" and "capturable" in name):
            yield partial(row, name)


KERNELS = {
    SDPBackend.FLASH_ATTENTION: "flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "efficient_attention",
}


def attention(device: str) -> Iterator[Callable[[], Row]]:
    """Fused kernels stay in the passes that need no forward mode, dropout or not."""

    def row(name: str, backend: SDPBackend, dtype: torch.dtype | None) -> Row:
        setting = Setting(device, dtype=torch.float32, autocast=dtype)
        calls: list[int] = []
        counted = kernel_calls(KERNELS[backend], calls)
        found = hypergradient(name, setting, sdpa_kernel([backend]), counted)
        references = references_of(name, setting, lambda: sdpa_kernel([backend]))
        case, kind = f"{name}, {KERNELS[backend]}", "bfloat16" if dtype else "float32"
        row = held(case, kind, found, references)
        layers = len(NETS[name].build().layers)
        # Of the train batch, whose graph is run backward twice, and of the meta batch.
        row["forward"], row["backward"] = (f"{n / layers:g}" for n in calls)
        enough = calls[0] >= 2 * layers and calls[1] >= 3 * layers
        return row if enough else {**row, "outcome": "wrong"}

    # On a CPU the only kernel knows no dropout.
    for name in ("vit", "lm") if device == "cpu" else ("vit", "lm", "encoder with dropout"):
        yield partial(row, name, SDPBackend.FLASH_ATTENTION, torch.bfloat16)
        if device == "cuda":
            yield partial(row, name, SDPBackend.EFFICIENT_ATTENTION, None)


@contextmanager
def kernel_calls(kernel: str, calls: list[int]) -> Iterator[None]:
    """How often a fused kernel runs forward, and backward.

    Args:
        kernel: as PyTorch has it in the name of the operation.
        calls: gets both numbers.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    names = [f"aten::_scaled_dot_product_{kernel}{place}" for place in ("", "_for_cpu")]
    for end in ("", "_backward"):
        wanted = {name + end for name in names}
        calls.append(sum(e.count for e in profile.key_averages() if e.key in wanted))


def waits(device: str) -> Iterator[Callable[[], Row]]:
    """After the first update no step waits for the device, or leaves its way."""

    def row(name: str, optimizer_name: str) -> Row:
        torch.manual_seed(0)
        net = NETS[name]
        model = net.build().to(device)
        optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
        step = MetaReweightStep(model, optimizer, SampleReweighter(net.num_exits).to(device))
        train, meta = placed(net.batch(), device), placed(net.batch(), device)
        step(train, meta)
        with waits_seen(device) as sites:
            for _ in range(3):
                optimizer.zero_grad()
                step.backward(train, meta)
        # cuDNN's layers have no second derivative: theirs come by differences of the layer alone.
        expected = {"torch.lstm", "torch.gru"} if name in CELLS else set()
        left = {
            "waits at": [f"{site} ×{count}" for site, count in sites.items()],
            "estimator": step.estimator if step.estimator != "auto" else "",
            "on the ladder": sorted(step._estimator.ladder.told.keys() - expected),
            "recall": "" if step._estimator.ladder.recalls else "given up",
        }
        left = {key: value for key, value in left.items() if value}
        fine = "no wait" if device == "cuda" else "not watched"
        outcome = "wrong" if left else fine
        return {"case": f"{name}, {optimizer_name}", "outcome": outcome, **left}

    for name in ("conv", "vit", "lm", "LSTM", "encoder with dropout"):
        for optimizer_name in ("SGD", "AdamW", "AdamW, fused"):
            yield partial(row, name, optimizer_name)


@contextmanager
def waits_seen(device: str) -> Iterator[Sites]:
    """Where the host waited for the device, by PyTorch's own warning, and how often.

    Errors would not do: whatever tries another way after an error would hide them.
    """
    sites: Sites = Counter()

    def note(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = traceback.extract_stack()[:-1]
            last = ([f for f in frames if f.filename.startswith(PACKAGE)] or frames)[-1]
            sites[f"{last.filename.rpartition('/')[2]}:{last.lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield sites
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def rows(run: Run) -> Iterator[Callable[[], Row]]:
    """All of it."""
    for part in (nets, waits, optimizers, attention):
        yield from part(run.device)
