"""Running the entries of a sweep: each in a process of its own, rows of CSV as they come."""

import csv
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from databases.judge import NOT_APPLICABLE, OUTCOMES, UNFINISHED, Case, Finding, judge

DTYPES = {"float64": torch.float64, "float32": torch.float32}
COLUMNS = (
    "entry",
    "dtype",
    "outcome",
    "how",
    "error",
    "gradient error",
    "double backward",
    "samples",
    "worst",
    "reason",
    "versions",
)
Row = dict[str, str]


class Sweep(NamedTuple):
    """One database.

    Attributes:
        entries: makes them, by name; called once, before the processes are forked.
        cases: what to judge of an entry, in a dtype.
        packages: whose versions belong to the results.
    """

    entries: Callable[[], Mapping[str, Any]]
    cases: Callable[[Any, torch.dtype], Iterable[Case]]
    packages: tuple[str, ...] = ("torch",)


def rows_of(sweep: Sweep, name: str, entry: Any) -> Iterator[Row]:
    """Judge an entry in both precisions; the worst of its samples counts."""
    for dtype_name, dtype in DTYPES.items():
        try:
            findings = [judge(case, dtype) for case in sweep.cases(entry, dtype)]
        except Exception as error:  # its samples cannot be made
            why = f"{type(error).__name__}: {error}"
            findings = [Finding(NOT_APPLICABLE, "", reason=why[:300])]
        if not findings:
            findings = [Finding(NOT_APPLICABLE, "", reason="no sample that can be trained")]
        worst = min(findings, key=_badness)
        worst.how = "; ".join(sorted({one.how for one in findings if one.how}))
        applicable = sum(one.outcome != NOT_APPLICABLE for one in findings)
        yield _row(name, dtype_name, worst, f"{applicable} of {len(findings)}")


def _badness(finding: Finding) -> tuple[int, bool, float]:
    return OUTCOMES.index(finding.outcome), not finding.reason, -(finding.error or 0.0)


def _row(name: str, dtype: str, worst: Finding, samples: str) -> Row:
    numbers = [
        "" if value is None else f"{value:.1e}" for value in (worst.error, worst.gradient_error)
    ]
    values = [worst.outcome, worst.how, *numbers, worst.double_backward, samples, worst.case]
    return dict(zip(COLUMNS, [name, dtype, *values, " ".join(worst.reason.split())], strict=False))


def run(
    sweep: Sweep,
    entries: Mapping[str, Any],
    limit: float,
    num_workers: int,
) -> Iterator[list[Row]]:
    """The rows of each entry as it ends; one that crashes or takes too long gets rows that say so.

    A process is forked for each, so that what it leaves behind dies with it.
    """
    waiting = list(entries.items())
    running: dict[Connection, tuple[str, BaseProcess, float, list[Row]]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < num_workers:
            name, entry = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, sweep, name, entry), daemon=True)
            process.start()
            theirs.close()
            running[ours] = name, process, time.monotonic() + limit, []
        soonest = min(deadline for _, _, deadline, _ in running.values())
        ready = wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
        for pipe in [*running]:
            name, process, deadline, rows = running[pipe]
            ended, why = False, ""
            if pipe in ready:
                try:
                    rows.append(pipe.recv())
                except EOFError:
                    process.join()
                    ended, why = True, f"crashed: exit code {process.exitcode}"
            elif time.monotonic() >= deadline:
                process.kill()
                process.join()
                ended, why = True, f"took longer than {limit:.0f} s"
            if ended:
                for dtype in list(DTYPES)[len(rows) :]:
                    rows.append(_row(name, dtype, Finding(UNFINISHED, "", reason=why), ""))
                del running[pipe]
                pipe.close()
                yield rows


def _send(pipe: Connection, sweep: Sweep, name: str, entry: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of what others wrote; those of the package are looked at
    try:
        for row in rows_of(sweep, name, entry):
            pipe.send(row)
    except BaseException:
        traceback.print_exc()
        raise


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row]) -> None:
    """These rows and no others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, rows: Iterable[Row]) -> None:
    """These rows after the others."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
