"""Run ``examples/train.py`` over several seeds and say how the two trainings differ.

Writes one row of CSV for each seed and prints the mean paired difference of every exit and of the
mean budgeted accuracy, in points, with its 95 % interval. What the file holds is not run again.

    python benchmarks/seeds.py --seeds 10 --out benchmarks/results/digits_seeds.csv -- --data digits
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
ARMS = ("conventional", "reweighted")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/digits_seeds.csv"
    )
    parser.add_argument("options", nargs="*", help="for examples/train.py, after --")
    settings = parser.parse_args()
    rows = read(settings.out)
    options = " ".join(settings.options)
    if any(row["options"] != options for row in rows):
        parser.error(f"{settings.out} holds runs with other options; choose another --out")
    done = {int(row["seed"]) for row in rows}
    for seed in range(settings.seeds):
        if seed not in done:
            rows.append(run(seed, settings.options))
            write(settings.out, rows)
            print(f"seed {seed} done", flush=True)
    report(rows)


def run(seed: int, options: list[str]) -> dict[str, str]:
    """One row: both arms' accuracies, in percent."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(TRAIN), *options, "--seed", str(seed), "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = json.loads(Path(out, "results.json").read_text())
    row = {"seed": str(seed), "options": " ".join(options)}
    for arm in ARMS:
        accuracies = results["arms"][arm]["anytime_accuracy"]
        for k, accuracy in enumerate(accuracies):
            row[f"{arm} exit {k + 1}"] = f"{100 * accuracy:.4f}"
        row[f"{arm} budgeted"] = f"{100 * results['arms'][arm]['mean_budgeted_accuracy']:.4f}"
    return row


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """All rows, anew."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[dict[str, str]]) -> None:
    """Mean paired differences with Student's 95 % interval."""
    columns = [
        name.removeprefix("reweighted ") for name in rows[0] if name.startswith("reweighted")
    ]
    print(f"reweighted − conventional over {len(rows)} seeds, points, 95 % interval")
    for column in columns:
        before, after = (np.array([float(row[f"{arm} {column}"]) for row in rows]) for arm in ARMS)
        differences = after - before
        reach = stats.t.ppf(0.975, len(rows) - 1) * stats.sem(differences)
        print(f"{column:>10}  {differences.mean():+.2f} ± {reach:.2f}")


if __name__ == "__main__":
    main()
