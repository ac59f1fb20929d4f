"""Is the hypergradient right on what others wrote? PyTorch's own databases, and whole models.

    python benchmarks/sweeps.py --ops --modules --optimizers --architectures --timm --peft
    python benchmarks/sweeps.py --ops --only embedding linalg  # these anew, the other rows stay
    python benchmarks/sweeps.py --ops --resume                 # go on where it was cut off
    python benchmarks/sweeps.py --ops --failed                 # what was not exact, anew

Each entry becomes a small net, which is trained for one step in float64 and in float32, in a
process of its own. The hypergradient of that step is held to an oracle that shares no code with
the package (``benchmarks/databases/oracles.py``). What came of it:

exact               within 1e-9 relative in float64, within 1e-4 in float32
inexact             within 1e-7 and 1e-2: more rounding than there need be
finite differences  of the whole model, because of one operation
warned              wrong, and the package said so
refused             with an error, though it trains by itself
unfinished          its process crashed, or took too long
wrong               silently
not applicable      it cannot be trained by itself, or only with values that are not finite

Rows go to benchmarks/results/sweeps/, one for each entry and precision, the worst of several
samples; summary.txt counts them, and the table that is printed stands in docs/compatibility.md.
PyTorch's databases want the package ``expecttest``.
"""

import argparse
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from databases import architectures, modules, ops, optimizers, peft_methods, timm_families
from databases.judge import EXACT, OUTCOMES
from databases.runner import DTYPES, Sweep, append, read, run, write

RESULTS = Path(__file__).parent / "results" / "sweeps"
SWEEPS = {
    "ops": Sweep(ops.entries, ops.cases),
    "modules": Sweep(modules.entries, modules.cases),
    "optimizers": Sweep(optimizers.entries, optimizers.cases),
    "architectures": Sweep(architectures.entries, architectures.cases, ("torch", "transformers")),
    "timm": Sweep(timm_families.entries, timm_families.cases, ("torch", "timm")),
    "peft": Sweep(peft_methods.entries, peft_methods.cases, ("torch", "transformers", "peft")),
}
RUNGS = ("by its backward", "by differences of that operation")
"""How an operation without a forward rule gets its tangents, as a row's ``how`` says it."""


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
    if settings.failed:
        failed = {row["entry"] for row in rows if row["outcome"] != EXACT}
        entries = {n: e for n, e in entries.items() if n in failed}
    write(path, [row for row in rows if row["entry"] not in entries])
    packages = ", ".join(f"{package} {version(package)}" for package in sweep.packages)
    for number, found in enumerate(
        run(sweep, entries, settings.seconds, settings.workers), start=1
    ):
        append(path, [row | {"versions": packages} for row in found])
        for row in found:
            told = row["error"] if row["outcome"] == EXACT else row["reason"]
            print(
                f"{name} {number}/{len(entries)}  {row['entry']}, {row['dtype']}: {row['outcome']} "
                f"{told[:100]}",
                flush=True,
            )
    write(path, sorted(read(path), key=lambda row: (row["entry"], row["dtype"])))


def table(results: Path) -> list[list[str]]:
    """Entries by outcome, a row for each sweep and precision; the first row names the columns."""
    head = ["database", "precision", "exact", *RUNGS, "exact, but warned of"]
    lines = [[*head, *(outcome for outcome in reversed(OUTCOMES) if outcome != EXACT)]]
    for name in SWEEPS:
        rows = read(results / f"{name}.csv")
        for dtype in DTYPES if rows else ():
            mine = [row for row in rows if row["dtype"] == dtype]
            exact = [row for row in mine if row["outcome"] == EXACT]
            found = Counter(row["outcome"] for row in mine)
            counts = [len(exact), *(sum(rung in row["how"] for row in exact) for rung in RUNGS)]
            counts += [sum(row["reason"] != "" for row in exact)]
            counts += [found[outcome] for outcome in reversed(OUTCOMES) if outcome != EXACT]
            lines.append([name, dtype, *map(str, counts)])
    return lines


def versions(results: Path) -> str:
    """What the rows were made with."""
    rows = [row for name in SWEEPS for row in read(results / f"{name}.csv")]
    found = {package for row in rows for package in row["versions"].split(", ")}
    return f"With {', '.join(sorted(found))}, on the CPU."


def markdown(results: Path) -> str:
    """The table as it stands in docs/compatibility.md."""
    head, *lines = (f"| {' | '.join(line)} |" for line in table(results))
    rule = "|---" * len(table(results)[0]) + "|"
    return "\n".join([head, rule, *lines, "", versions(results)])


def summary(results: Path) -> str:
    """The table, and every row that is not exact, the worst first."""
    lines = table(results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text += ["", versions(results)]
    for name in SWEEPS:
        rows = [row for row in read(results / f"{name}.csv") if row["outcome"] != EXACT]
        text += ["", f"{name}: what is not exact"] if rows else []
        for row in sorted(rows, key=lambda row: OUTCOMES.index(row["outcome"])):
            text.append(
                f"  {row['outcome']}: {row['entry']}, {row['dtype']}, {row['worst']} "
                f"{row['error']}  {row['reason'][:140]}".rstrip()
            )
    return "\n".join(text) + "\n"


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
    parser.add_argument("--failed", action="store_true", help="those that have a row not exact")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=120, help="the most for an entry")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args(arguments)
    for name in SWEEPS:
        if getattr(settings, name):
            sweep_one(name, settings)
    (settings.results / "summary.txt").write_text(summary(settings.results))
    print(markdown(settings.results))


if __name__ == "__main__":
    main()
