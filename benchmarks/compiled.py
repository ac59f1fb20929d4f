"""What torch.compile, bfloat16 and channels_last make of a step, plain and ours.

All contestants of a net take turns in one process. Each one's time is given as the median over the
rounds of its ratio to the plain step of the same form (both compiled, or both not), and to the
plain step in float32 that is not compiled. In the last part the same processes run with glibc told
to keep what is freed, which saves the page faults of asking for it again.

    python benchmarks/compiled.py          # some 10 minutes on two cores, half of it compilation
    python benchmarks/compiled.py --nets vit --forms float32 --allocator given
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from contestants import contestant
from measure import median_ratios, seconds_by_turns
from nets import NETS, Batch, Net

FORMS = ("float32", "bfloat16", "channels_last")
STEPS = {"plain": "plain", "ours": "ours, forward"}
KEEP = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"}
ALLOCATORS = ("given", "keeping", "both")


def autocast(form: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if form == "bfloat16" else nullcontext()


def in_form(net: Net, form: str, compiled: bool) -> Net:
    """The net with its model and batches of this form."""

    def build() -> nn.Module:
        model = net.build()
        if form == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if compiled else model

    def batch() -> Batch:
        inputs, target = net.batch()
        if form == "channels_last":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, target

    return replace(net, build=build, batch=batch)


def cast(form: str, step: Callable[[], object]) -> None:
    with autocast(form):
        step()


def print_net(name: str, forms: list[str], num_rounds: int) -> None:
    torch.compiler.reset()
    contestants = {}
    for form in forms:
        for compiled in (False, True):
            for who, title in STEPS.items():
                step, _ = contestant(in_form(NETS[name], form, compiled), "sgd", title)
                step = partial(cast, form, step)
                start = time.perf_counter()
                step()  # compiles
                print(
                    f"first {name} {form} {who} {time.perf_counter() - start:.1f} s",
                    file=sys.stderr,
                )
                contestants[form, compiled, who] = step, 1
    seconds = seconds_by_turns(contestants, num_rounds)
    to_eager = median_ratios(seconds, ("float32", False, "plain"))
    for (form, compiled, who), values in seconds.items():
        to_same = median_ratios(seconds, (form, compiled, "plain"))[form, compiled, who]
        print(
            f"{name:>5}  {form:<13} {'compiled' if compiled else 'eager':<9} {who:<6}"
            f"{1e3 * statistics.median(values):>8.0f} {to_same:>11.2f} "
            f"{to_eager[form, compiled, who]:>13.2f}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["conv", "vit"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="both")
    settings = parser.parse_args()
    if settings.allocator == "keeping" and KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    warnings.filterwarnings("ignore", category=UserWarning)  # of the compiler, of its own
    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, SGD, allocator "
        + ("keeping what is freed" if settings.allocator == "keeping" else "as given")
    )
    print("  net  form          model     step        ms  plain = 1  float32 eager plain = 1")
    for name in settings.nets:
        forms = [f for f in settings.forms if f != "channels_last" or name in ("conv", "msdnet")]
        print_net(name, ["float32", *(f for f in forms if f != "float32")], settings.rounds)
    if settings.allocator == "both":
        arguments = ["--nets", *settings.nets, "--forms", "float32", "--allocator", "keeping"]
        rounds = ["--rounds", str(settings.rounds)]
        subprocess.run([sys.executable, __file__, *arguments, *rounds], check=True)


if __name__ == "__main__":
    main()
