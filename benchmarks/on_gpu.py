"""What a card shows, in six minutes: exactness, kernels, cost and a training run.

Four stages in order of worth, each in a process of its own with a limit of time, so that none
takes what another was to show. Rows are written as they come, one JSON object a line; the table is
printed at the end. Nothing is fetched: Fashion-MNIST is read where `examples/data.py` finds it.

    python benchmarks/on_gpu.py --out rows.jsonl
    python benchmarks/on_gpu.py --stages kernels cost
    python benchmarks/on_gpu.py --device cpu --tiny     # small sizes, a few of each: about a minute
"""

import argparse
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

Row = dict[str, Any]

LIMITS = {"exactness": 90.0, "kernels": 50.0, "cost": 95.0, "training": 120.0}  # seconds


def rows_of(
    stage: str, device: str, tiny: bool, folder: Path | None
) -> Iterator[Callable[[], Row]]:
    """The stage's measurements, each to be called in its turn."""
    if stage == "exactness":
        from card.exactness import rows
    elif stage == "kernels":
        from card.kernels import rows
    elif stage == "cost":
        from card.cost import rows
    else:
        from card.training import rows as training_rows

        return training_rows(device, tiny, folder)
    return rows(device, tiny)


def measure(stage: str, device: str, tiny: bool, folder: Path | None) -> Iterator[Row]:
    """Its rows; one that fails says how, and the next goes on."""
    for row in rows_of(stage, device, tiny, folder):
        try:
            found = row()
        except Exception as error:  # whatever a card may come up with is what is asked for
            given = getattr(row, "args", ())
            case = ", ".join(each for each in given if isinstance(each, str))
            found = {"case": case, "outcome": "error", "reason": f"{type(error).__name__}: {error}"}
        yield {"stage": stage, **found}


def versions(device: str) -> Row:
    """Where the rows come from."""
    import numpy
    import torchopt

    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    found = {"stage": "versions", "card": card, "Python": platform.python_version()}
    found |= {"torch": torch.__version__, "torchopt": torchopt.__version__}
    found |= {"numpy": numpy.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def run(stage: str, command: list[str], limit: float, out: TextIO) -> list[Row]:
    """Run one stage, and write its rows as they come, for so many seconds at most."""
    command = [*command, "--stage", stage]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("{"):
                out.write(line)
                out.flush()
                found.append(json.loads(line))
    if not timer.is_alive():
        found.append({"stage": stage, "case": "", "outcome": f"stopped after {limit:g} s"})
    elif process.returncode:
        found.append({"stage": stage, "case": "", "outcome": f"ended with {process.returncode}"})
    timer.cancel()
    return found


def print_table(rows: list[Row]) -> None:
    """Each row on a line, its figures by name."""
    stage = ""
    for row in rows:
        if row["stage"] != stage:
            stage = row["stage"]
            print(f"\n{stage}")
        figures = [
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("stage", "case", "precision", "outcome")
        ]
        head = f"  {row.get('case', ''):<42} {row.get('precision', ''):<9} {row.get('outcome', '')}"
        print(f"{head:<66} {'; '.join(figures)}".rstrip())
    outcomes = [row["outcome"] for row in rows if "outcome" in row]
    counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
    print("\n" + ", ".join(f"{number} {name}" for name, number in counts.items()))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, or, as one of them, print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, a few of each")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is")
    parser.add_argument("--out", type=Path, help="file of the rows, one JSON object a line")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    device, tiny, folder = settings.device, settings.tiny, settings.data_dir
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no card: take --device cpu, or one built for CUDA.")
    if settings.stage:
        for row in measure(settings.stage, device, tiny, folder):
            print(json.dumps(row), flush=True)
        return
    command = [sys.executable, __file__, "--device", device]
    command += ["--tiny"] if tiny else []
    command += ["--data-dir", str(folder)] if folder else []
    rows = [versions(device)]
    with open(settings.out or "/dev/null", "w") as out:
        out.write(json.dumps(rows[0]) + "\n")
        for stage in settings.stages:
            rows += run(stage, command, LIMITS[stage], out)
    print_table(rows)


if __name__ == "__main__":
    main()
