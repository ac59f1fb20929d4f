"""What a card shows, in six minutes: exactness, kernels, cost and a training run.

Four stages in order of worth, each in a process of its own. What a stage leaves of its time goes
to the next; what is not over by then is stopped. Rows are printed and written as they come, one
JSON object a line. Nothing is fetched.

    python benchmarks/on_gpu.py --data-dir /usr/share/datasets/fashion-mnist --out rows.jsonl
    python benchmarks/on_gpu.py --stages kernels cost
    python benchmarks/on_gpu.py --device cpu --tiny  # small sizes: some two minutes

A machine without network needs, beside PyTorch and NumPy, the wheels of torchopt, optree and
graphviz, and a folder with the four files of Fashion-MNIST, packed or not, for --data-dir. Without
the files the last stage is one row, an error that names the option. higher and Liger
(liger_kernel) are measured where they are installed.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

START = time.monotonic()

import torch  # noqa: E402 - its time counts too

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from card.timing import Run, wait_for  # noqa: E402

Row = dict[str, Any]

LIMITS = {"exactness": 90.0, "kernels": 45.0, "cost": 95.0, "training": 118.0}  # seconds
NEEDED = ("torchopt", "optree", "graphviz")  # without the last torchopt cannot be imported
AGAIN = 75  # what a process ends with that has lost its device: another is to go on


def rows_of(stage: str, run: Run) -> Iterator[Callable[[], Row]]:
    """The stage's measurements, each to be called in its turn."""
    found: Iterator[Callable[[], Row]] = importlib.import_module(f"card.{stage}").rows(run)
    return found


def measure(stage: str, run: Run, skip: int = 0) -> Iterator[Row]:
    """A row of each measurement but the first few; one that fails says how, and the next goes on.

    An error that the device does not recover from, such as an illegal memory access, ends the
    process after its row.
    """
    rows = islice(rows_of(stage, run), skip, None)
    for row in rows:
        if run.seconds_left() < 0:
            left = "; ".join(case_of(each) for each in (row, *rows))
            yield {"stage": stage, "case": "the rest", "outcome": "not reached", "rows": left}
            return
        lost = False
        try:
            found = row()
            wait_for(run.device)  # what it has left to the device may fail too
        except Exception as error:  # whatever a card may come up with is what is asked for
            reason = f"{type(error).__name__}: {error}"[:500]
            found = {"case": case_of(row), "outcome": "error", "reason": reason}
            lost = is_lost(run.device)
        yield {"stage": stage, **found}
        if lost:
            raise SystemExit(AGAIN)


def case_of(row: Callable[[], Row]) -> str:
    """What a measurement is given, as far as it says something."""
    kinds = str, tuple, torch.dtype, bool
    return ", ".join(str(each) for each in getattr(row, "args", ()) if isinstance(each, kinds))


def is_lost(device: str) -> bool:
    """Whether the device fails whatever it is asked for from here on."""
    try:
        wait_for(device)
    except Exception:
        return True
    return False


def versions(device: str) -> Row:
    """Where the rows come from."""
    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    found = {"stage": "versions", "card": card, "Python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "torchopt", "higher", "liger_kernel"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Report:
    """Prints and writes each row as it comes.

    Args:
        out: file of the rows, one JSON object a line.
    """

    def __init__(self, out: TextIO) -> None:
        self.rows: list[Row] = []
        self._out = out

    def __call__(self, row: Row) -> None:
        """One more row."""
        if not self.rows or self.rows[-1]["stage"] != row["stage"]:
            print(f"\n{row['stage']}")
        self.rows.append(row)
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()
        figures = [
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("stage", "case", "precision", "outcome")
        ]
        head = f"  {row.get('case', ''):<42} {row.get('precision', ''):<9} {row.get('outcome', '')}"
        print(f"{head:<66} {'; '.join(figures)}".rstrip(), flush=True)

    def summary(self) -> str:
        """How many rows came to what."""
        outcomes = [row["outcome"] for row in self.rows if "outcome" in row]
        counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
        return ", ".join(f"{number} {name}" for name, number in counts.items())


def rows_from(command: list[str], deadline: float) -> Iterator[Row | int | None]:
    """The rows that a process prints, then what it ended with; None if it had to be stopped.

    Nothing that it started outlives it, and nobody waits for what holds its output.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout
        with process.stdout as output:
            for line in output:
                lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while time.monotonic() < deadline:
            has_ended = process.poll() is not None
            try:
                row = json.loads(lines.get(timeout=0.2))
            except queue.Empty:
                if has_ended:
                    yield process.returncode
                    return
            except ValueError:  # something else, or the half of a row
                continue
            else:
                if isinstance(row, dict):
                    yield row
        yield None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(1.0)  # what has left the group may hold the output for longer


def run_stage(stage: str, command: list[str], deadline: float, report: Report) -> None:
    """Run one stage to its end or the deadline, in another process where one has died."""
    num_rows = 0
    while True:
        code, num_found = None, 0
        given = ["--stage", stage, "--skip", str(num_rows), "--until", str(deadline - 2)]
        for found in rows_from([*command, *given], deadline):
            if isinstance(found, dict):
                report(found)
                num_found += 1
            else:
                code = found
        num_rows += num_found
        if code is None:
            report({"stage": stage, "case": "the rest", "outcome": "stopped at its limit"})
        elif code and code != AGAIN:
            num_rows += 1  # the one that it died of
            report({"stage": stage, "case": f"row {num_rows}", "outcome": f"ended with {code}"})
        if not code or not num_found:
            return


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, or, as one of them, print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on one thread")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is")
    parser.add_argument("--out", type=Path, help="file of the rows, one JSON object a line")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    device = settings.device
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing: install the wheels of {', '.join(NEEDED)}.")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no card: take --device cpu, or one built for CUDA.")
    if settings.stage:
        if settings.tiny:
            torch.set_num_threads(1)
        run = Run(device, settings.tiny, settings.data_dir, settings.until)
        code = 0
        try:
            for row in measure(settings.stage, run, settings.skip):
                print(json.dumps(row), flush=True)
        except SystemExit:
            code = AGAIN
        os._exit(code)  # compilers take seconds to end, and a device that is lost may never do so
    command = [sys.executable, "-W", "ignore", __file__, "--device", device]
    command += ["--tiny"] if settings.tiny else []
    command += ["--data-dir", str(settings.data_dir)] if settings.data_dir else []
    with open(settings.out or os.devnull, "w") as out:
        report, deadline = Report(out), START
        report(versions(device))
        for stage in settings.stages:
            deadline += LIMITS[stage]
            run_stage(stage, command, deadline, report)
    print(f"\n{report.summary()}; {time.monotonic() - START:.0f} s")


if __name__ == "__main__":
    main()
