"""Is the hypergradient right on what others wrote? PyTorch's own databases, and architectures.

    python benchmarks/sweeps.py --ops --modules --optimizers --architectures
    python benchmarks/sweeps.py --ops --only embedding linalg  # these anew, the other rows stay
    python benchmarks/sweeps.py --ops --resume                 # go on where it was cut off

Each entry becomes a small net, which is trained for one step in float64 and in float32, in a process
of its own. The hypergradient of that step is held to an oracle that shares no code with the package
(``benchmarks/databases/judge.py``). What came of it:

exact               within 1e-9 relative in float64, within 1e-4 in float32
inexact             within 1e-7 and 1e-2: more rounding than there need be
finite differences  of the whole model, because of one operation
warned              wrong, and the package said so
refused             with an error, though it trains by itself
wrong               silently
not applicable      it cannot be trained by itself, or only with values that are not finite

Rows go to benchmarks/results/sweeps/, one for each entry and precision, the worst of several
samples; summary.txt counts them. PyTorch's databases want the packages ``expecttest`` and
``hypothesis``.
"""

import argparse
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from databases import modules, ops, optimizers
from databases.judge import EXACT, NOT_APPLICABLE, OUTCOMES
from databases.runner import DTYPES, Row, Sweep, append, read, run, write

RESULTS = Path(__file__).parent / "results" / "sweeps"
SWEEPS = {
    "ops": Sweep(ops.entries, ops.cases),
    "modules": Sweep(modules.entries, modules.cases),
    "optimizers": Sweep(optimizers.entries, optimizers.cases),
}


def sweep_one(name: str, settings: argparse.Namespace) -> None:
    """Run the entries that are asked for; rows are in the file as soon as they are known."""
    sweep, path = SWEEPS[name], settings.results / f"{name}.csv"
    entries, rows = sweep.entries(), read(path)
    if settings.only:
        entries = {n: e for n, e in entries.items() if any(part in n for part in settings.only)}
    entries = dict(list(entries.items())[: settings.limit])
    if settings.resume:
        done = Counter(row["entry"] for row in rows)
        entries = {n: e for n, e in entries.items() if done[n] < len(DTYPES)}
    write(path, [row for row in rows if row["entry"] not in entries])
    versions = ", ".join(f"{package} {version(package)}" for package in sweep.packages)
    for number, found in enumerate(
        run(sweep, entries, settings.seconds, settings.workers), start=1
    ):
        append(path, [row | {"versions": versions} for row in found])
        for row in found:
            told = row["error"] if row["outcome"] == EXACT else row["reason"]
            print(
                f"{name} {number}/{len(entries)}  {row['entry']}, {row['dtype']}: {row['outcome']} "
                f"{told[:100]}",
                flush=True,
            )
    write(path, sorted(read(path), key=lambda row: (row["entry"], row["dtype"])))


def counts(rows: list[Row]) -> dict[str, Counter[str]]:
    """How many entries came out how, for each precision."""
    return {
        dtype: Counter(row["outcome"] for row in rows if row["dtype"] == dtype) for dtype in DTYPES
    }


def summary(results: Path) -> str:
    """Counts of all sweeps that there are rows of, and the rows that are not exact."""
    lines = [f"Python {platform.python_version()}, CPU. Entries by outcome:", ""]
    lines.append(f"{'':<16}{'':<9}" + "".join(f"{outcome:>20}" for outcome in reversed(OUTCOMES)))
    rest = []
    for name in SWEEPS:
        rows = read(results / f"{name}.csv")
        for dtype, found in counts(rows).items():
            cells = "".join(f"{found[outcome]:>20}" for outcome in reversed(OUTCOMES))
            lines.append(f"{name:<16}{dtype:<9}{cells}")
        versions = sorted({row["versions"] for row in rows})
        lines.append(f"{'':<16}{'; '.join(versions)}")
        rest += [
            f"{name}  {row['entry']}, {row['dtype']}: {row['outcome']} {row['error']}  "
            f"{row['reason'][:160]}"
            for row in sorted(rows, key=lambda row: OUTCOMES.index(row["outcome"]))
            if row["outcome"] not in (EXACT, NOT_APPLICABLE)
        ]
    return "\n".join([*lines, "", "All that is not exact:", "", *rest]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the sweeps that are asked for and write their summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SWEEPS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", nargs="+", help="entries whose name contains one of these")
    parser.add_argument("--limit", type=int, help="the first so many of them")
    parser.add_argument("--resume", action="store_true", help="keep the rows that there are")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=120, help="the most for an entry")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args(arguments)
    for name in SWEEPS:
        if getattr(settings, name):
            sweep_one(name, settings)
    text = summary(settings.results)
    (settings.results / "summary.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
